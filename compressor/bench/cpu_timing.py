"""Times on a CPU: candidates take turns, each call on a weight that is no longer in the cache, and
the fastest call of each counts, as what other work on the machine adds is not its own.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

CACHED = 300_000_000  # bytes that are more than the caches of a CPU hold

Calls = Sequence[Callable[[], Any]]
"""The same call on several weights."""


def processor() -> str:
    """Name of this machine's CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )


def environment() -> dict[str, Any]:
    """What the numbers depend on."""
    from compressor_kernels.cpu.build import compiler_version

    return {
        "cpu": processor(),
        "threads": torch.get_num_threads(),
        "compiler": compiler_version(),
        "python": platform.python_version(),
        **{
            name.replace("-", "_"): version(name)
            for name in ("torch", "transformers", "compress-llm")
        },
    }


def copies(nbytes: int) -> int:
    """How many weights of `nbytes` must take turns so that none is still in the cache."""
    return max(2, -(-CACHED // nbytes))


def fastest(calls: Mapping[str, Calls], turns: int, seconds: float) -> dict[str, float]:
    """Seconds of the fastest call of each candidate. All take `turns` turns, or at least three
    within `seconds`.
    """
    best, until = dict.fromkeys(calls, float("inf")), time.monotonic() + seconds
    for turn in range(turns):
        for name, several in calls.items():
            call = several[turn % len(several)]
            started = time.perf_counter()
            call()
            best[name] = min(best[name], time.perf_counter() - started)
        if turn >= 2 and time.monotonic() > until:
            break
    return best


def read_bandwidth() -> float:
    """Gigabytes a second that a sum far larger than the caches reads."""
    several = [torch.ones(1 << 24) for _ in range(copies(1 << 26))]
    best = fastest({"read": [numbers.sum for numbers in several]}, 40, float("inf"))
    return several[0].nbytes / best["read"] / 1e9
