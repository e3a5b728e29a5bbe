"""Which kernel runs, and how: measured rows from table.json, shipped as data, or a rule where
nothing was measured.

A row is {"device", "op", "out", "in", "rows", "kernel", …}: on that device and shape it holds for
every call of at most `rows` rows of x (and more than the row before it). `speedup` is what it
measured against dense cuBLAS. `benchmarks/gpu.py` writes the rows. Nothing is tuned while a model
runs: a choice is a function of the shape, so CUDA graphs may capture any call.
"""

from __future__ import annotations

import json
from collections import defaultdict
from functools import cache, lru_cache
from importlib.resources import files
from typing import Any

import torch

from compressor_kernels.backend import device_name, multiprocessors

# beyond, multiplying limits the speed, not reading: the dense weight is written once, for cuBLAS
MOST_ROWS = 96


@cache
def table() -> dict[tuple[str, str, int, int], list[dict[str, Any]]]:
    """The measured rows by device, op, out and in; those for few rows of x first."""
    rows = json.loads(files("compressor_kernels").joinpath("table.json").read_text())
    found: dict[tuple[str, str, int, int], list[dict[str, Any]]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: row["rows"]):
        found[row["device"], row["op"], row["out"], row["in"]].append(row)
    return dict(found)


def measured(
    op: str, device: torch.device, out_features: int, in_features: int, rows: int
) -> dict[str, Any] | None:
    """The row of the table for a call, or None."""
    for row in table().get((device_name(device), op, out_features, in_features), ()):
        if rows <= row["rows"]:
            return row
    return None


@lru_cache(1 << 14)
def choose(
    op: str, device: torch.device, out_features: int, in_features: int, rows: int
) -> dict[str, Any]:
    """`kernel` and its settings for one call of an op; found once, not to be changed."""
    return measured(op, device, out_features, in_features, rows) or rule(
        op, out_features, in_features, rows, multiprocessors(device)
    )


def rule(
    op: str, out_features: int, in_features: int, rows: int, processors: int
) -> dict[str, Any]:
    """What runs where nothing was measured: settings that keep every multiprocessor at work and
    partial sums few.

    ops: `stored` (2:4 as on disk), `fragments` (2:4 in fragment order), `armor` (all of it; the
        kernel `dense` is its core by
    itself between the wrappers by torch) and `skinny` (a factor of a low-rank weight).
    """
    if rows > (
        64 if op == "armor" else MOST_ROWS
    ):  # A times more columns than 64 does not fit into the registers
        return {"kernel": "dense"}
    if op in ("fragments", "armor"):
        return _mma(out_features, in_features, rows, processors, most=8 if op == "armor" else 16)
    block = 16 if rows <= 16 else 32 if rows <= 32 else 64
    programs = -(-out_features // 32) * -(-rows // block)
    split = _split(5 * processors, programs, in_features, 16 * block)
    return {
        "kernel": "dot",
        "bm": block,
        "bn": 32,
        "bk": 128,
        "split": split,
        "warps": 2,
        "stages": 3,
    }


def _mma(
    out_features: int, in_features: int, rows: int, processors: int, most: int
) -> dict[str, Any]:
    """As many row tiles of 16 a program that it reads a quarter of their size of x, or less, and
    all programs at work at once.

    `most` warps a program: with 16 Triton puts no barrier between the fence and the last product of
    ARMOR's blocks.
    """
    high = 1 if rows <= 2 else 2 if rows <= 4 else 4 if rows <= 8 else 8
    each = min(high, 2)  # of a warp, which share what it loads of x
    registers = (
        64 if each == 1 else 80 if rows <= 8 else 96 if rows <= 16 else 200
    )  # at most, see tests/test_compile.py
    programs = -(-out_features // (16 * high))
    warps = most if rows <= 16 and programs <= processors * _resident(registers, 16) else 8
    least = max(
        256, 128 * warps * each // high, 8 * rows
    )  # two tiles of each warp, and sums that are small beside them
    split = max(1, min(processors * _resident(registers, warps) // programs, in_features // least))
    return {
        "kernel": "mma", "warps": warps, "stack": high // each, "row_tiles": each, "split": split,
        "unroll": 1, "ordered": rows > 16,
    }  # fmt: skip


def _resident(registers: int, warps: int) -> int:
    """Programs that a multiprocessor holds at once."""
    return 65536 // (32 * registers * warps)


def _split(wanted: int, programs: int, in_features: int, least: int) -> int:
    """Parts of K: about `wanted` programs in all, each with at least `least` columns."""
    return max(1, min(round(wanted / programs), in_features // least))
