"""Checkpoints of compressed-tensors in its retired `sparse-24-bitmask` format, brought into ours.

A linear `NAME` of theirs is three tensors, and no `NAME.weight`:

    NAME.compressed  [out, in / 2]          the kept weights, row by row, in column order
    NAME.bitmask     [out, ceil(in / 8)]    uint8; bit c % 8 of byte c // 8 of a row says whether
                     column c is kept
    NAME.shape       int64, out and in      `[2, 1]` or `[2]`

Every aligned group of four columns keeps exactly two. The libraries that could read this dropped it
in 2026; what loads such a folder today gives it random weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from compressor.checkpoint.packed_config import compressed_config
from compressor.checkpoint.reader import Reader
from compressor.checkpoint.writer import Writer, check_output
from compressor.errors import CheckpointError
from compressor.formats.sparse24 import Sparse24

PARTS = ("compressed", "bitmask", "shape")
WEIGHT_DTYPES = ("F32", "F16", "BF16")
_CONFIG_KEYS = (
    "quantization_config",
    "compression_config",
    "sparsity_config",
)  # where its versions described themselves


def import_bitmask(folder: Path, output: Path) -> tuple[int, int]:
    """Write `output` with the bitmask weights of `folder` in our packed format; returns how many
    were packed, and unpacked.

    Linears outside the decoder blocks, such as a language head, are written dense: our format packs
        linears of blocks.

    Raises:
        CheckpointError: no bitmask weights, quantised ones, or tensors that do not belong together.
    """
    reader = Reader(folder)
    names = [
        name.removesuffix(".compressed") for name in reader.tensors if name.endswith(".compressed")
    ]
    _refuse_others(reader, names)
    check_output(output, reader)
    packed, dense = [], 0
    with Writer(reader, output, {f"{name}.{part}" for name in names for part in PARTS}) as writer:
        for name in names:
            weight = _weight(reader, name)
            if re.search(r"\.\d+\.", name):  # a member of a numbered stack: a decoder block's
                stored = Sparse24.from_dense(weight).pack()
                packed.append(name)
            else:
                stored, dense = {"weight": weight}, dense + 1
            writer.replace(f"{name}.compressed", stored)
            for part in PARTS[1:]:
                writer.replace(f"{name}.{part}", {})
        config = {key: value for key, value in reader.config.items() if key not in _CONFIG_KEYS}
        writer.finish(
            compressed_config(config, {name: {"format": Sparse24.FORMAT} for name in packed}), {}
        )
    return len(packed), dense


def _refuse_others(reader: Reader, names: list[str]) -> None:
    described = (
        reader.config.get("quantization_config") or reader.config.get("compression_config") or {}
    )
    if not names:
        raise CheckpointError(
            f"{reader.folder} holds no sparse-24-bitmask weights (no tensor NAME.compressed); "
            "for a dense checkpoint with zeros use `compressor.pack`"
        )
    if isinstance(described, Mapping) and described.get("config_groups"):
        raise CheckpointError(
            f"{reader.folder} is quantised as well (config_groups); only float weights are imported"
        )
    for name in names:
        if missing := [part for part in PARTS if f"{name}.{part}" not in reader.tensors]:
            raise CheckpointError(f"{reader.folder}: {name} has no tensor {name}.{missing[0]}")
        if f"{name}.weight" in reader.tensors:
            raise CheckpointError(
                f"{reader.folder}: {name} has a dense weight beside the compressed one"
            )


def _weight(reader: Reader, name: str) -> Tensor:
    """The dense weight `[out, in]` of linear `name`. Raises CheckpointError."""
    declared = reader.tensors[f"{name}.shape"]
    if declared.dtype != "I64" or declared.shape not in ((2, 1), (2,)):
        raise CheckpointError(
            f"{name}.shape is {declared.dtype} {list(declared.shape)}, two int64 numbers are "
            f"expected"
        )
    shape = tuple(reader.read(f"{name}.shape").view(-1).tolist())
    _check_entries(reader, name, shape)
    try:
        return decode(reader.read(f"{name}.compressed"), reader.read(f"{name}.bitmask"), shape)
    except ValueError as error:
        raise CheckpointError(f"{name} is damaged: {error}") from None


def _check_entries(reader: Reader, name: str, shape: tuple[int, ...]) -> None:
    """The declared shape against the headers, before anything of that size is made."""
    rows, columns = shape
    expected = {
        "compressed": (WEIGHT_DTYPES, (rows, columns // 2)),
        "bitmask": (("U8",), (rows, -(-columns // 8))),
    }
    for part, (dtypes, wanted) in expected.items():
        entry = reader.tensors[f"{name}.{part}"]
        if columns % 4 or entry.shape != wanted or entry.dtype not in dtypes:
            needed = f"{name}.shape {list(shape)} needs {' or '.join(dtypes)} {list(wanted)}"
            raise CheckpointError(f"{name}.{part} is {entry.dtype} {list(entry.shape)}; {needed}")


def decode(compressed: Tensor, bitmask: Tensor, shape: tuple[int, int]) -> Tensor:
    """The dense weight of a bitmask pair.

    Args:
        compressed: `[out, in / 2]`, any float dtype.
        bitmask: uint8 `[out, ceil(in / 8)]`.
        shape: (out, in), `in` a multiple of four.

    Returns:
        `[out, in]` in the dtype of `compressed`.

    Raises:
        ValueError: a group of four columns that does not keep exactly two.
    """
    rows, columns = shape
    bits = bitmask.unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8) & 1
    kept = bits.view(rows, -1)[:, :columns].bool()
    wrong = kept.view(rows, columns // 4, 4).sum(-1) != 2
    if bool(wrong.any()):
        row, group = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"its bitmask does not keep two of the columns {4 * group}..{4 * group + 3} of row "
            f"{row}"
        )
    weight = torch.zeros(rows, columns, dtype=compressed.dtype)
    return weight.masked_scatter_(kept, compressed)
