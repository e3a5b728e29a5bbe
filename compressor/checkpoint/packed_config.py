"""How a compressed folder names itself in config.json; docs/format.md is its specification.

Transformers ignores a quantisation method it does not know and goes on with random weights. So
config.json also sets
`transformers_weights` to a sentence: without our plug-in transformers takes it for a file name,
refuses it and prints it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from compressor.errors import CheckpointError

QUANT_METHOD = "compress-llm"
VERSION = 1
TRANSPOSED = "transposed"  # key of an entry whose dense weight is stored [in, out]
GUARD = (
    "this checkpoint is compressed: `pip install compress-llm` and `import compressor.runtime` "
    "before loading it"
)


def compressed_config(
    config: Mapping[str, Any], modules: Mapping[str, Mapping[str, Any]]
) -> dict[str, Any]:
    """`config` for a checkpoint whose linears `modules` (name -> {"format": …}) are packed;
    unchanged if none is.
    """
    if not modules:
        return dict(config)
    described = {"quant_method": QUANT_METHOD, "version": VERSION, "modules": dict(modules)}
    return {**config, "quantization_config": described, "transformers_weights": GUARD}


def module_entry(entry: Mapping[str, Any], *, transposed: bool) -> dict[str, Any]:
    """A form's entry as the table of modules has it: what turns it back into a dense checkpoint
    must know of gpt2's layout.
    """
    return {**entry, TRANSPOSED: True} if transposed else dict(entry)


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` without what `compressed_config` added."""
    return {
        key: value
        for key, value in config.items()
        if key not in ("quantization_config", "transformers_weights")
    }


def packed_modules(config: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The table of packed linears of a config, empty for a dense checkpoint.

    Raises:
        CheckpointError: a newer version, or a table that is malformed.
    """
    described = config.get("quantization_config")
    if not isinstance(described, Mapping) or described.get("quant_method") != QUANT_METHOD:
        return {}
    version, modules = described.get("version"), described.get("modules")
    if version != VERSION:
        raise CheckpointError(
            f"the checkpoint has format version {version!r}, this package reads {VERSION}: update "
            f"compress-llm"
        )
    if not isinstance(modules, Mapping) or not all(
        isinstance(entry, Mapping) and isinstance(entry.get("format"), str)
        for entry in modules.values()
    ):
        raise CheckpointError(
            "config.json: quantization_config.modules must map each linear to its format"
        )
    return {str(name): dict(entry) for name, entry in modules.items()}


def stored_modules(
    config: Mapping[str, Any], tensors: Collection[str]
) -> dict[str, dict[str, Any]]:
    """As `packed_modules`, each linear under the name that its tensors have.

    Transformers writes the tensors of a base model without the name that a model with a head has
    it under, and the config of either as it was loaded: a base model that is saved alone has
    tensors `layers.0…` and a config that says `model.layers.0…`, one that got a head the reverse.

    Args:
        config: of the checkpoint.
        tensors: the names of all its tensors.

    Raises:
        CheckpointError: as `packed_modules`.
    """
    modules = packed_modules(config)
    linears = {
        owner
        for owner, _, suffix in (name.rpartition(".") for name in tensors)
        if suffix.startswith("weight_")
    }
    if not modules or not modules.keys().isdisjoint(linears):
        return modules  # names that are right, or wrong in another way than all by one prefix
    first = next(iter(modules))
    base = f"{first.partition('.')[0]}."
    if all(name.startswith(base) for name in modules):
        shorter = {name.removeprefix(base): entry for name, entry in modules.items()}
        if shorter.keys() <= linears:
            return shorter
    for linear in linears:
        if linear.endswith(f".{first}"):
            longer = {linear.removesuffix(first) + name: e for name, e in modules.items()}
            if longer.keys() <= linears:
                return longer
    return modules
