"""Packed linears as the headers of a checkpoint show them: no torch, no tensor is read."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from compressor.errors import CheckpointError
from compressor.formats import FORMATS, PACKED, form_class
from compressor.formats.form import Spec

_BEGIN = "weight_"  # how the suffixes of all packed forms begin


def packed_headers(tensors: Mapping[str, Any]) -> dict[str, dict[str, Spec]]:
    """Linear -> suffix -> header, of every tensor whose last word begins as those of packed forms
    do.

    Args:
        tensors: name -> something with the `dtype` and `shape` of a safetensors header.
    """
    found: dict[str, dict[str, Spec]] = {}
    for name, tensor in tensors.items():
        linear, _, suffix = name.rpartition(".")
        if suffix.startswith(_BEGIN):
            found.setdefault(linear, {})[suffix] = Spec(tensor.dtype, tuple(tensor.shape))
    return found


def unlisted(tensors: Iterable[str], modules: Mapping[str, Any]) -> list[str]:
    """Names that end as those of some packed form do, but belong to no linear of `modules`."""
    known = {suffix for name in PACKED for suffix in FORMATS[name].SUFFIXES}
    return [
        name
        for name in tensors
        if name.rpartition(".")[2] in known and name.rpartition(".")[0] not in modules
    ]


def check_headers(name: str, entry: Mapping[str, Any], stored: Mapping[str, Spec]) -> Spec:
    """The dense weight that a packed linear stands for.

    Args:
        name: of the linear.
        entry: what config.json says of it.
        stored: headers of its tensors, by suffix.

    Raises:
        CheckpointError: a tensor is missing, or is not what its form prescribes.
    """
    form = form_class(entry["format"])
    if any(suffix not in stored for suffix in form.SUFFIXES):
        raise CheckpointError(
            f"config.json names the packed linear {name!r}, but its tensors are not there"
        )
    try:
        shape = form.dense_shape(stored)
    except ValueError as error:
        raise CheckpointError(f"{name}.{error}") from None
    try:
        form.check_entry(entry, shape)
    except ValueError as error:
        raise CheckpointError(f"config.json gives {name} {error}") from None
    dense = Spec(form.dense_dtype(entry, stored), shape)
    expected = form.stored_specs(entry, dense)
    for suffix, spec in stored.items():
        if suffix not in expected:
            raise CheckpointError(
                f"{name}.{suffix} does not belong to the format {entry['format']}"
            )
        if spec != expected[suffix]:
            raise CheckpointError(f"{name}.{suffix} is {spec}, {expected[suffix]} is expected")
    return dense
