"""Where hidden states rest, so that a run stays within the memory it may use."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING

from compressor.errors import UsageError

if TYPE_CHECKING:
    import torch

    from compressor.job import Job

_UNITS = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 1 << 20, "GIB": 1 << 30, "TIB": 1 << 40}


def parse_size(text: str) -> int:
    """Bytes of `"8GB"`, `"500 MB"` or `"1.5GiB"`. Raises UsageError."""
    found = re.fullmatch(r"\s*(\d{1,9}(?:\.\d{1,9})?)\s*([MGT]i?B)\s*", text, re.IGNORECASE)
    if not found or not float(found[1]):
        raise UsageError(f"max-memory is {text!r}; accepted: a number and MB, GB, TB, MiB, GiB or TiB, such as 8GB")
    return int(float(found[1]) * _UNITS[found[2].upper()])


def hidden_bytes(job: Job, tokens: int) -> int:
    """Bytes of the hidden states of so many tokens; those of the dense model too where blocks are tuned towards it."""
    width = getattr(job.skeleton.config.get_text_config(decoder=True), "hidden_size", 0)
    return tokens * width * job.skeleton.dtype.itemsize * (2 if job.tune else 1)


def block_bytes(job: Job) -> int:
    """About what work on the largest block takes: its weights, copies and temporaries of them, and Gram matrices."""
    size = max(sum(p.numel() for p in block.parameters()) for block in job.skeleton.blocks) * job.skeleton.dtype.itemsize
    widths = [{task.linear.shape[1] for task in tasks} for tasks in job.tasks]
    return 3 * size + (4 * max(sum(width**2 for width in own) for own in widths) if job.needs_gram else 0)


def choose_home(job: Job, tokens: int, device: torch.device, limit: str, folder: Path) -> torch.device | Path:
    """The device, the host's memory, or `folder` on disk: the first that has room for the hidden states of `tokens` tokens.

    Args:
        job: what will be done.
        tokens: of the calibration, in this process.
        device: where blocks are computed; a GPU keeps hidden states while they take less than half of its free memory.
        limit: `--max-memory`, what this process may use of the host's memory; empty for half of what is free.
        folder: on disk.

    Raises:
        UsageError: one block alone does not fit into `limit`.
    """
    import psutil
    import torch

    needed = hidden_bytes(job, tokens)
    if device.type == "cuda" and needed < torch.cuda.mem_get_info(device)[0] / 2:
        return device
    host = torch.device("cpu")
    if not limit:
        return host if needed < psutil.virtual_memory().available / 2 else folder
    used = psutil.Process().memory_info().rss + (0 if device.type == "cuda" else block_bytes(job))
    room = parse_size(limit) - used
    if room < 0:
        raise UsageError(f"max-memory {limit} is too little: one block and the libraries take about {used / 1e9:.2f} GB")
    return host if needed < room else folder
