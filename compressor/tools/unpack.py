"""A packed folder back to a plain dense checkpoint that every tool reads, tensor by tensor."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.checkpoint.packed_config import (
    TENSOR,
    TRANSPOSED,
    module_entry,
    place_of,
    plain_config,
    shared_tensors,
    stored_modules,
)
from compressor.checkpoint.reader import Reader
from compressor.checkpoint.writer import Writer, check_output
from compressor.errors import CheckpointError
from compressor.formats import form_class, form_of
from compressor.formats.headers import packed_headers, unlisted


def unpack(folder: Path, output: Path) -> int:
    """Write `output` with the dense weights (zeros in place) of the packed checkpoint `folder`;
    returns how many there were.

    Raises:
        CheckpointError: nothing is packed in it, or a packed linear is incomplete or damaged.
    """
    reader = Reader(folder)
    modules = stored_modules(reader.config, reader.tensors)
    if not modules:
        raise CheckpointError(f"{folder} holds no packed linears: it is a plain checkpoint already")
    check_output(output, reader)
    stored = packed_headers(reader.tensors)
    suffixes = {name: _in_order(entry, stored.get(name, ())) for name, entry in modules.items()}
    if missing := [name for name in modules if not suffixes[name]]:
        raise CheckpointError(
            f"{folder}: config.json names the packed linear {missing[0]!r}, but its tensors are "
            f"not there"
        )
    if stray := unlisted(reader.tensors, modules):
        raise CheckpointError(f"{folder}: {stray[0]} is packed, but config.json does not list it")
    listed = {f"{name}.{suffix}" for name in modules for suffix in suffixes[name]}
    with Writer(reader, output, listed) as writer:
        for name, entry in modules.items():
            if TENSOR not in place_of(entry):
                weight = _dense(reader, name, entry, suffixes[name])
                _put(writer, f"{name}.weight", weight, [name], suffixes)
        for tensor, names in shared_tensors(modules).items():
            parts = [_dense(reader, name, modules[name], suffixes[name]) for name in names]
            if len({part.shape for part in parts}) > 1:
                raise CheckpointError(f"{tensor} is damaged: its matrices differ in shape")
            _put(writer, tensor, torch.stack(parts), names, suffixes)
        writer.finish(plain_config(reader.config), {})
    return len(modules)


def _in_order(entry: Mapping[str, Any], found: Iterable[str]) -> list[str]:
    """Suffixes of stored tensors as their form lists them. The first is in the weight's dtype, and
    the weight goes where that was: in a shard wide items come before narrow ones.
    """
    order = form_class(entry["format"]).SUFFIXES
    return sorted(found, key=lambda suffix: order.index(suffix) if suffix in order else len(order))


def _put(
    writer: Writer, tensor: str, weight: Tensor, names: list[str], suffixes: dict[str, list[str]]
) -> None:
    """Write the dense `tensor` in place of the stored tensors of the linears `names`."""
    owner, _, leaf = tensor.rpartition(".")
    stored = [f"{name}.{suffix}" for name in names for suffix in suffixes[name]]
    writer.replace(stored[0], {leaf: weight}, owner=owner)
    for other in stored[1:]:
        writer.replace(other, {})


def _dense(reader: Reader, name: str, entry: dict[str, Any], suffixes: list[str]) -> Tensor:
    """The weight of a packed linear as a dense checkpoint has it. Raises CheckpointError."""
    where = place_of(entry)
    try:
        stored = form_of(entry, {suffix: reader.read(f"{name}.{suffix}") for suffix in suffixes})
        whole = set(stored.pack()) == set(suffixes)
        if module_entry(stored.entry, where) != entry or not whole:
            raise ValueError(
                f"config.json says {entry}, its tensors {sorted(suffixes)} are {stored.entry}"
            )
        return stored.dense().T if TRANSPOSED in where else stored.dense()
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{name} is damaged: {error}") from None
