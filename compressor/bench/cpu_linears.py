"""One linear at a time on a CPU: the packed layouts against torch's dense product, at the same
shape; and against a dense kernel written as ours are, which is the honest bar.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from compressor.bench.cpu_timing import copies, fastest
from compressor.bench.kernels import OPS, module, random24
from compressor_kernels.cpu import ops

SHAPES = ((2048, 2048), (5632, 2048), (4096, 4096), (4096, 14336))
ROWS = (1, 2, 4, 8, 16, 64, 512)
TWIN = "dense, our kernel"


@torch.inference_mode()
def measure_shape(
    shape: tuple[int, int],
    rows: Iterable[int],
    dtype: torch.dtype,
    read: float,
    seconds: float,
    make: Callable[[str, Tensor], Any] = module,
) -> list[dict[str, Any]]:
    """Result rows for one shape.

    Args:
        shape: (out, in) of the weight; 2:4 and random.
        rows: numbers of rows of x.
        dtype: of weights and x.
        read: the bandwidth of reading in GB/s.
        seconds: to be spent, about; more where a call is slow.
        make: form, 2:4 weight -> its prepared module, or None.
    """
    cpu, counts = torch.device("cpu"), list(rows)
    weight = random24(*shape, dtype, cpu)
    packed = {op: made for op in OPS if (made := make(op, weight)) is not None}
    bytes_of = {
        op: sum(tensor.nbytes for tensor in made.state_dict().values())
        for op, made in packed.items()
    }
    several = {
        op: [made, *(copy.deepcopy(made) for _ in range(copies(weight.nbytes // 2) - 1))]
        for op, made in packed.items()
    }
    dense = [weight.clone() for _ in range(copies(weight.nbytes))]
    half = len(dense) // 2
    found = []
    for m in counts:
        x = torch.randn(m, shape[1], dtype=dtype)
        calls = {
            "dense": [partial(linear, x, w) for w in dense],
            # not the weight that torch has just brought into the cache
            TWIN: [partial(ops.dense, x, w, None) for w in dense[half:] + dense[:half]],
            **{op: [partial(made, x) for made in mades] for op, mades in several.items()},
        }
        best = fastest(calls, 400 if m < 64 else 40, seconds / len(counts))
        for op, time in best.items():
            size = bytes_of.get(op, weight.nbytes) + x.nbytes + m * shape[0] * x.itemsize
            found.append(_row(shape, x, op, time, best, size, read))
    return found


def _row(
    shape: tuple[int, int],
    x: Tensor,
    op: str,
    time: float,
    best: dict[str, float],
    size: int,
    read: float,
) -> dict[str, Any]:
    speed = size / time / 1e9
    return {
        "out": shape[0],
        "in": shape[1],
        "rows": len(x),
        "dtype": str(x.dtype).removeprefix("torch."),
        "op": op,
        "us_min": round(1e6 * time, 1),
        "gb_per_s": round(speed, 1),
        "percent_of_read": round(100 * speed / read, 1),
        "ratio": round(best["dense"] / time, 3),
        "ratio_to_our_dense": round(best[TWIN] / time, 3),
    }


@torch.inference_mode()
def call_overhead() -> float:
    """Microseconds that a call of a packed 2:4 linear costs more than `F.linear`, where there is
    next to nothing to compute (64 x 64, bfloat16, one row).
    """
    weight = random24(64, 64, torch.bfloat16, torch.device("cpu"))
    x, made = torch.randn(1, 64, dtype=torch.bfloat16), module("sparse24", weight)
    calls = {"ours": [partial(made, x)], "torch": [partial(linear, x, weight)]}
    best = fastest(calls, 3000, float("inf"))
    return 1e6 * (best["ours"] - best["torch"])
