"""That a model gets every weight it computes with from the files. Transformers makes up what it
does not find, and goes on with a warning.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from compressor.checkpoint.header import Entry, read_header
from compressor.errors import CheckpointError
from compressor.formats import FORMATS, PACKED
from compressor.model import hf_conversion

_SUFFIXES = {suffix for name in PACKED for suffix in FORMATS[name].SUFFIXES}
_FLOATS = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2")
_WHOLE = {torch.int8: "I8", torch.uint8: "U8", torch.int16: "I16", torch.int32: "I32"}


def check_files(
    model: Any, paths: Mapping[str, str], files: Sequence[Path], quantizer: Any
) -> None:
    """Compare the headers of the weight files with `model`, before anything is read.

    Args:
        model: on the meta device, its packed modules in place.
        paths: name of each packed linear -> path of its module.
        files: all weight files.
        quantizer: transformers' object for this format; it changes how names are converted.

    Raises:
        CheckpointError: a weight that is missing, packed tensors of another shape or type than
            config.json makes them, packed tensors that it does not list, files that are no
            safetensors.
    """
    if other := [file for file in files if file.suffix != ".safetensors"]:
        raise CheckpointError(f"{other[0]} is no safetensors file: packed weights are in those")
    folder = files[0].parent
    tensors: dict[str, Entry] = {}
    for file in files:
        tensors |= read_header(file)[0]
    goes_to = {
        name: parameter
        for parameter, found in hf_conversion.sources(model, tensors, quantizer).items()
        for name, _ in found
    }
    state = model.state_dict()
    reached = hf_conversion.targets(model, tensors, quantizer)
    if missing := _made_up(model, state.keys() - reached):
        raise CheckpointError(
            f"{folder} lacks {missing[0]} ({len(missing)} tensors in all): its weights cannot be "
            f"trusted"
        )
    packed = {f"{path}.": name for name, path in paths.items()}
    for name, parameter in goes_to.items():
        owner = packed.get(f"{parameter.rpartition('.')[0]}.")
        if parameter not in state and (owner or name.rpartition(".")[2] in _SUFFIXES):
            raise CheckpointError(
                f"{folder}: config.json does not list {name} as it is stored: its weights cannot "
                f"be trusted"
            )
        if owner and ".weight_" in parameter:
            _check_one(folder, name, tensors[name], state[parameter])


def _check_one(folder: Path, name: str, entry: Entry, expected: Any) -> None:
    if entry.shape != tuple(expected.shape):
        raise CheckpointError(
            f"{folder}: {name} has shape {list(entry.shape)}; as config.json describes it, it has "
            f"{list(expected.shape)}"
        )
    stored_as = _FLOATS if expected.is_floating_point() else (_WHOLE.get(expected.dtype),)
    if entry.dtype not in stored_as:
        raise CheckpointError(f"{folder}: {name} is stored as {entry.dtype}, which cannot be")


def check_loaded(model: Any) -> None:
    """The same of a model that was given a state dict, afterwards. Raises CheckpointError."""
    kept = model.state_dict().keys()
    tensors = dict(model.named_parameters(remove_duplicate=False))  # tied ones under each name
    tensors |= {name: buffer for name, buffer in model.named_buffers() if name in kept}
    given = "_is_hf_initialized"  # transformers sets it on what it was given
    random = {name for name, tensor in tensors.items() if not getattr(tensor, given, False)}
    if missing := _made_up(model, random):
        raise CheckpointError(f"the state dict lacks {missing[0]}: its weights cannot be trusted")


def _made_up(model: Any, missing: set[str]) -> list[str]:
    """Those of the parameters `missing` that must not be random.

    A head may be, of a class that is not the one that was saved: who loads a classifier from a
    language model means to train its head. One that gives the next token may not.
    """
    ties: dict[str, set[str]] = {}
    for target, source in (getattr(model, "all_tied_weights_keys", None) or {}).items():
        ties.setdefault(source, {source}).add(target)
    alike = {name for group in ties.values() if group - missing for name in group}
    ignored = list(getattr(model, "_keys_to_ignore_on_load_missing", None) or [])
    kept = ("",)
    if type(model).__name__ not in (model.config.architectures or []):
        parts = (model.base_model, model.get_output_embeddings())
        kept = tuple(
            f"{name}." if name else ""
            for name, module in model.named_modules()
            if any(module is part for part in parts)
        )
    return sorted(
        name
        for name in missing - alike
        if name.startswith(kept) and not any(re.search(pattern, name) for pattern in ignored)
    )
