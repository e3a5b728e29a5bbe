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
# keys of an entry: its dense weight is stored [in, out]; it is the matrix AT of the dense TENSOR
TRANSPOSED, TENSOR, AT = "transposed", "tensor", "at"
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


def place(transposed: bool, tensor: str, at: int | None) -> dict[str, Any]:
    """What turns a packed linear back into the tensor of a dense checkpoint must know of it, as
    keys of its entry.

    Args:
        transposed: the dense weight is stored `[in, out]`, as gpt2's Conv1D is.
        tensor: the dense tensor's name.
        at: its place along the first dimension of that tensor, where it holds all experts; None
            for a tensor that is the linear's own, which is named as the linear is.
    """
    turned = {TRANSPOSED: True} if transposed else {}
    return turned if at is None else {**turned, TENSOR: tensor, AT: at}


def place_of(entry: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of an entry that `place` made; those of another kind are left out."""
    tensor, at = entry.get(TENSOR), entry.get(AT)
    shared = isinstance(tensor, str) and type(at) is int and at >= 0
    return place(entry.get(TRANSPOSED) is True, str(tensor), at if shared else None)


def module_entry(entry: Mapping[str, Any], where: Mapping[str, Any]) -> dict[str, Any]:
    """A form's entry as the table of modules has it, with the `place` of the dense weight."""
    return {**entry, **where}


def shared_tensors(modules: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    """Dense tensors that hold the matrices of all experts -> their packed linears, in order.

    Raises:
        CheckpointError: the table lists one twice, or not all of them.
    """
    found: dict[str, dict[int, str]] = {}
    for name, entry in modules.items():
        where = place_of(entry)
        if TENSOR in where:
            held = found.setdefault(where[TENSOR], {})
            if where[AT] in held:
                raise CheckpointError(
                    f"config.json gives {name} the place {where[AT]} of {where[TENSOR]}, where "
                    f"{held[where[AT]]} is"
                )
            held[where[AT]] = name
    for tensor, held in found.items():
        if missing := set(range(len(held))) - held.keys():
            raise CheckpointError(
                f"config.json lists {len(held)} matrices of {tensor}, and number {min(missing)} is "
                f"not among them"
            )
    return {tensor: [held[at] for at in sorted(held)] for tensor, held in found.items()}


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
