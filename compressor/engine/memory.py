"""Where hidden states rest and how many Gram matrices are alive at once, so that a run stays within
the memory it may use.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from compressor.engine.task import Rank, Task
from compressor.errors import UsageError
from compressor.free_memory import free_memory
from compressor.methods import factors
from compressor.stats import SAMPLE_TOKENS
from compressor.text import size

if TYPE_CHECKING:
    import torch

    from compressor.engine.plan import Plan

_UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}


def parse_size(text: str) -> int:
    """Bytes of `"8GB"`, `"500 MB"` or `"1.5GiB"`. Raises UsageError."""
    found = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*([MGT]i?B)\s*", text, re.IGNORECASE)
    if not found or not float(found[1]):
        raise UsageError(
            f"`max_memory` is {text!r}; accepted: a number and MB, GB, TB, MiB, GiB or TiB, such "
            f"as 8GB"
        )
    return int(float(found[1]) * _UNITS[found[2].upper()])


def hidden_bytes(plan: Plan, tokens: int) -> int:
    """Bytes of the hidden states of so many tokens; those of the dense model too where blocks or
    linears aim at it.
    """
    width = getattr(plan.skeleton.config.get_text_config(decoder=True), "hidden_size", 0)
    return tokens * width * plan.skeleton.dtype.itemsize * (2 if plan.keeps_dense else 1)


def gram_bytes(task: Task) -> int:
    """Bytes of the statistics of one linear's inputs, with the Gram matrix."""
    width = task.linear.shape[1]
    return 4 * width * (width + 2 * SAMPLE_TOKENS)  # a second sample is that of what is held out


def block_bytes(plan: Plan) -> int:
    """About what work on the largest block takes, Gram matrices aside: its weights, copies and
    temporaries of them, dense ones beside compressed ones where linears are matched, and what a
    method makes of one Gram matrix.
    """
    size = largest_block(plan) * plan.skeleton.dtype.itemsize
    return (4 if plan.strengths else 3) * size + max(map(partial(_work_bytes, plan), plan.every))


def largest_block(plan: Plan) -> int:
    """Numbers in the parameters of the largest block."""
    return max(sum(p.numel() for p in block.parameters()) for block in plan.skeleton.blocks)


def _work_bytes(plan: Plan, task: Task) -> int:
    """About what a method makes of the weight and the statistics of one linear."""
    matching = _matching_bytes(task) if plan.strengths else 0
    if factors(task.method):
        return matching + factoring_bytes(task)
    return matching + (4 * gram_bytes(task) if plan.needs_gram else 0)


def _matching_bytes(task: Task) -> int:
    """Bytes that stay while a method works on a linear that aims at the dense model: in float32 the
    cross products of its inputs, two samples of these, the shift of its weight, and two weights.
    """
    rows, columns = task.linear.shape
    return 4 * (columns * (columns + 2 * SAMPLE_TOKENS) + 3 * rows * columns)


def factoring_bytes(task: Task) -> int:
    """Bytes that a method works with that makes factors: in float64 the roots of the metrics of the
    inputs and, with gradients, of the outputs, and what the largest of the steps holds beside them.
    """
    rows, columns = task.linear.shape
    size, short = rows * columns, min(rows, columns)
    rank = task.target if isinstance(task.target, Rank) else short
    gram, gradients = task.method.NEEDS_GRAM, task.needs_gradients
    metrics = columns**2 * (2 if gradients else gram) + rows**2 * gradients  # A is held scaled too
    wide = max(columns * (gram or gradients), rows * gradients)
    steps = (
        wide**2 * 3 // 2,  # a root is made of a copy, which is checked for what is not finite
        size * 5 // 2,  # the whitened weight, which is checked likewise
        size + 4 * short**2,  # the eigenvectors of its Gram matrix, found by LAPACK
        2 * size + short**2 + rank * (rows + columns + 2 * short),  # the factors made of them
        # both twice, the rows that are no pivots, and V as it is stored
        size + short**2 + 2 * rank * (2 * rows + columns) + rank * columns // 2,
    )
    return 8 * (metrics + max(steps))


def choose_home(
    plan: Plan, tokens: int, device: torch.device, limit: str, folder: Path, beside: int = 0
) -> torch.device | Path:
    """The device, the host's memory, or `folder` on disk: the first that has room for the hidden
    states of `tokens` tokens.

    Args:
        plan: what will be done.
        tokens: of the calibration, in this process.
        device: where blocks are computed; a GPU keeps hidden states while they take less than half
            of its free memory.
        limit: `--max-memory`, what this process may use of the host's memory; empty for half of
            what is free.
        folder: on disk.
        beside: bytes that passes before the first block keep beside them, in the same place.

    Raises:
        UsageError: one block alone does not fit into `limit`.
    """
    import torch

    needed = hidden_bytes(plan, tokens) + beside
    if device.type == "cuda" and needed < torch.cuda.mem_get_info(device)[0] / 2:
        return device
    host = torch.device("cpu")
    if not limit:
        return host if needed < free() / 2 else folder
    room = _left(plan, device, limit)
    if room < 0:
        used = size(parse_size(limit) - room)
        raise UsageError(
            f"`max_memory` {limit} is too little: one block and the libraries take about {used}"
        )
    grams = (
        max(sum(map(gram_bytes, tasks)) for tasks in plan.tasks)
        if plan.needs_gram and device.type != "cuda"
        else 0
    )
    return host if needed + grams < room else folder


def gram_room(plan: Plan, device: torch.device, limit: str) -> int:
    """Bytes that the Gram matrices of a block may take together: what `limit` leaves, or half of
    what is free on the device.
    """
    import torch

    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] // 2
    return max(0, _left(plan, device, limit)) if limit else free() // 2


def in_groups(tasks: Sequence[Task], room: int, inputs: Mapping[str, int]) -> list[list[Task]]:
    """The tasks in order, so many together that their statistics stay within `room` bytes; one at
    least.

    Args:
        tasks: of one block.
        room: for the statistics of a group.
        inputs: by name, what a linear reads: those with the same number share their statistics; the
            others have their own.
    """
    groups: list[list[Task]] = [[]]
    taken, seen = 0, set()
    for task in tasks:
        read = inputs.get(task.linear.name, task.linear.name)
        more = 0 if read in seen else gram_bytes(task)
        if more and taken + more > room and groups[-1]:
            groups.append([])
            taken, seen = 0, set()
        groups[-1].append(task)
        taken += more
        seen.add(read)
    return groups


def _left(plan: Plan, device: torch.device, limit: str) -> int:
    """Of `limit`, what this process does not use yet, nor will for work on a block."""
    import psutil

    return (
        parse_size(limit)
        - psutil.Process().memory_info().rss
        - (0 if device.type == "cuda" else block_bytes(plan))
    )


def free() -> int:
    """Bytes free on this machine, for each of the processes that torchrun started on it."""
    return free_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
