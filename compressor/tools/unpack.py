"""A packed folder back to a plain dense checkpoint that every tool reads, tensor by tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from compressor.checkpoint.packed_config import (
    TRANSPOSED,
    module_entry,
    plain_config,
    stored_modules,
)
from compressor.checkpoint.reader import Reader
from compressor.checkpoint.writer import Writer, check_output
from compressor.errors import CheckpointError
from compressor.formats import form_of
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
    suffixes = {name: list(stored.get(name, ())) for name in modules}
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
            _unpack_one(reader, writer, name, entry, suffixes[name])
        writer.finish(plain_config(reader.config), {})
    return len(modules)


def _unpack_one(
    reader: Reader, writer: Writer, name: str, entry: dict[str, Any], suffixes: list[str]
) -> None:
    transposed = entry.get(TRANSPOSED) is True
    try:
        stored = form_of(entry, {suffix: reader.read(f"{name}.{suffix}") for suffix in suffixes})
        if module_entry(stored.entry, transposed=transposed) != entry or set(stored.pack()) != set(
            suffixes
        ):
            raise ValueError(
                f"config.json says {entry}, its tensors {sorted(suffixes)} are {stored.entry}"
            )
        weight = stored.dense().T if transposed else stored.dense()
    except (KeyError, ValueError) as error:
        raise CheckpointError(f"{name} is damaged: {error}") from None
    first, *rest = suffixes
    writer.replace(f"{name}.{first}", {"weight": weight})
    for suffix in rest:
        writer.replace(f"{name}.{suffix}", {})
