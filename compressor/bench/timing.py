"""Times on a CUDA device, as a decoding model sees them: launches replayed from a CUDA graph,
weights never in the cache.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compressor.errors import CompressError

COPIES = 8  # at least so many weights take turns
LAUNCHES = 64  # that share the start of a graph
BUSY = 0.01  # seconds


class Time(NamedTuple):
    """Microseconds of one call."""

    median: float
    p20: float
    p80: float


def need_gpu() -> torch.device:
    """The current CUDA device. Raises CompressError without one."""
    if not torch.cuda.is_available():
        raise CompressError("no CUDA device is here: nothing was measured")
    return torch.device("cuda", torch.cuda.current_device())


def environment(device: torch.device) -> dict[str, Any]:
    """What the numbers depend on."""
    from importlib.metadata import PackageNotFoundError, version

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    return {
        "gpu": torch.cuda.get_device_name(device),
        "driver": _driver(),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
        **{
            name.replace("-", "_"): installed(name)
            for name in ("torch", "triton", "transformers", "compress-llm")
        },
    }


def _driver() -> str | None:
    import subprocess

    try:
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return (
            subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True)
            .stdout.split("\n")[0]
            .strip()
        )
    except (OSError, subprocess.SubprocessError):
        return None


def copies(nbytes: int, device: torch.device) -> int:
    """How many weights of `nbytes` must take turns so that none is still in the L2 cache."""
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(COPIES, -(-3 * cache // nbytes))


def measure(calls: Sequence[Callable[[], Any]], replays: int = 20) -> Time:
    """The time of one of `calls`, which are captured one after the other, LAUNCHES or more in all,
    and replayed together.

    The clock is not started before the GPU has been busy for a while: an idle one runs slowly.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles and warms up outside the capture
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph, rounds = torch.cuda.CUDAGraph(), -(-LAUNCHES // len(calls))
    with torch.cuda.graph(graph):
        for call in list(calls) * rounds:
            call()
    begun = time.perf_counter()
    while time.perf_counter() - begun < BUSY:
        graph.replay()
        torch.cuda.synchronize()
    marks = [
        (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
        for _ in range(replays)
    ]
    for start, end in marks:
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    each = torch.tensor(
        [start.elapsed_time(end) * 1000 / (len(calls) * rounds) for start, end in marks],
        dtype=torch.float64,
    )
    return Time(*(float(each.quantile(q)) for q in (0.5, 0.2, 0.8)))


def copy_bandwidth(device: torch.device, nbytes: int = 1 << 30) -> float:
    """Gigabytes a second, read and written, of a copy far larger than the cache."""
    source = torch.empty(nbytes, dtype=torch.uint8, device=device)
    target: Tensor = torch.empty_like(source)
    return 2 * nbytes / measure([lambda: target.copy_(source)]).median / 1e3
