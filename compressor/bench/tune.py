"""Which settings of the kernels are fastest on this GPU: what may be set, and all of it measured,
by shape and rows of x.
"""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from compressor.bench import timing
from compressor.bench.ahead import compile_ahead
from compressor.bench.kernels import OPS, module, random, random24
from compressor_kernels import backend, kernel_config
from compressor_kernels import sparse24 as sparse
from compressor_kernels.armor import run_armor
from compressor_kernels.lowrank import run_skinny


def describe(config: dict[str, Any]) -> str:
    """The settings in a line."""
    return " ".join(
        f"{value}" if key == "kernel" else f"{key} {value}" for key, value in config.items()
    )


def mma_configs(
    out_features: int,
    rows: int,
    processors: int,
    heights: tuple[int, ...],
    orders: tuple[bool, ...],
) -> list[dict]:
    """Arrangements of programs so many row tiles high; where K is split, with 8 to 48 warps for
    each multiprocessor.
    """
    found = []
    for high, each, warps, unroll, split in itertools.product(
        heights, (1, 2), (8, 16), (1, 2), (1, 2, 4, 8)
    ):
        resident = -(-out_features // (16 * high)) * split * warps / processors
        fits = (
            high % each == 0
            and (unroll == 1 or (each == 1 and rows <= 4))
            and warps <= (16 if rows <= 16 else 8)
        )
        if fits and (split == 1 or 8 <= resident <= 48):
            config = {
                "kernel": "mma",
                "warps": warps,
                "stack": high // each,
                "row_tiles": each,
                "split": split,
                "unroll": unroll,
            }
            found += [{**config, "ordered": ordered} for ordered in orders]
    return found


def dot_configs(rows: int) -> list[dict[str, Any]]:
    """Settings of the products with `tl.dot`."""
    block = 16 if rows <= 16 else 32 if rows <= 32 else 64
    return [
        {
            "kernel": "dot",
            "bm": block,
            "bn": 32,
            "bk": bk,
            "split": split,
            "warps": warps,
            "stages": 3,
        }
        for warps, bk, split in itertools.product((2, 4), (128, 256), (1, 2, 4, 8, 16))
    ]


@torch.no_grad()
def tune(
    device: torch.device, shapes: Iterable[tuple[int, int]], rows: Iterable[int], until: float
) -> Iterator[tuple[list[dict[str, Any]], list[dict[str, Any]]]]:
    """For each shape and count of rows all measurements, and the best of each op as a row of the
    table. Stops in time.
    """
    for n, k in shapes:
        weight = random24(n, k, torch.bfloat16, device)
        count = timing.copies(weight.nbytes // 2, device)
        dense = [weight.clone() for _ in range(count)]
        modules = {op: [module(op, weight) for _ in range(count)] for op in OPS}
        for m in rows:
            if time.monotonic() > until:
                print(f"out of time before {m} rows of {n} x {k}", file=sys.stderr)
                return
            x = random(m, k, dtype=torch.bfloat16, device=device)
            cublas = timing.measure(
                [partial(torch.nn.functional.linear, x, w) for w in dense], 10
            ).median
            candidates = _candidates(modules, x)
            compile_ahead(
                partial(run, modules[_kind(op)][0], config)
                for op, _, run, configs in candidates
                for config in configs
            )
            everything, best = [], []
            for op, size, run, configs in candidates:
                base = {
                    "device": backend.device_name(device),
                    "op": op,
                    "out": size[0],
                    "in": size[1],
                    "rows": m,
                }
                timed = [_timed(run, modules[_kind(op)], config) for config in configs]
                fastest = min(timed, key=_us)
                if fastest["kernel"] == "mma" and backend.hopper(device):
                    overlapped = {key: value for key, value in fastest.items() if key != "us"} | {
                        "pdl": True
                    }
                    timed.append(_timed(run, modules[_kind(op)], overlapped))
                    fastest = min(timed, key=_us)
                everything += [{**base, **row, "dense_us": round(cublas, 2)} for row in timed]
                if "error" in fastest:  # none of them runs here; `tune` has the errors
                    continue
                best.append(
                    {
                        **base,
                        **fastest,
                        **({} if op == "skinny" else {"speedup": round(cublas / fastest["us"], 3)}),
                    }
                )
                print(
                    f"{op} {size[0]} x {size[1]}, {m} rows: cuBLAS {cublas:.1f} us: "
                    f"{describe(fastest)}",
                    file=sys.stderr,
                )
            yield everything, best


def _timed(run: Any, modules: list[Any], config: dict[str, Any]) -> dict[str, Any]:
    """The configuration with what it took, or why it does not run."""
    try:
        return {
            **config,
            "us": round(
                timing.measure([partial(run, made, config) for made in modules], 10).median, 2
            ),
        }
    except Exception as error:  # too many registers, say: not a choice
        return {**config, "error": str(error)[:200]}


def _us(row: dict[str, Any]) -> float:
    return row.get("us", float("inf"))


def _kind(op: str) -> str:
    return {"fragments": "sparse24", "armor": "armor", "skinny": "lowrank"}[op]


def _candidates(
    modules: dict[str, list[Any]], x: Tensor
) -> list[tuple[str, tuple[int, int], Any, list[dict[str, Any]]]]:
    """Op, shape, how to run a module with a configuration, and the configurations, the rule's
    first, for one x.
    """
    m = len(x)
    example = modules["lowrank"][0]
    n, k, rank = example.out_features, example.in_features, example.rank
    processors, inner = (
        backend.multiprocessors(x.device),
        random(m, rank, dtype=x.dtype, device=x.device),
    )
    usual = kernel_config.rule("fragments", n, k, m, processors)
    high = usual["stack"] * usual["row_tiles"]
    heights = tuple(tall for tall in (high // 2, high, 2 * high) if 1 <= tall <= 8)
    mma = mma_configs(
        n, m, processors, heights, (False,) if m <= 4 else (False, True) if m <= 16 else (True,)
    )
    gemv = (
        [{"kernel": "gemv", "warps": w, "split": s} for w, s in itertools.product((8, 16), (1, 2))]
        if m == 1
        else []
    )

    def armor(made: Any, config: dict[str, Any]) -> Tensor:
        core, a, b = made.core.fragments, made.weight_a, made.weight_b
        return run_armor(x, core, a, b, None, made.semaphore, config)

    def fragments(made: Any, config: dict[str, Any]) -> Tensor:
        return sparse.run_fragments(x, made.core.fragments, n, None, made.semaphore, config)

    found = [
        (
            "fragments",
            (n, k),
            fragments,
            mma + gemv,
        ),
        (
            "skinny",
            (rank, k),
            lambda made, c: run_skinny(x, made.weight_v, None, made.semaphore, c),
            dot_configs(m),
        ),
        (
            "skinny",
            (n, rank),
            lambda made, c: run_skinny(inner, made.weight_u, None, made.semaphore, c),
            dot_configs(m),
        ),
    ]
    if m <= 64:  # a block of A: two programs, or one
        wrapped = mma_configs(n, m, processors, (4, 8), (True,))
        found.append(
            ("armor", (n, k), armor, [config for config in wrapped if config["warps"] == 8])
        )
    return [
        (op, size, run, [kernel_config.rule(op, size[0], size[1], m, processors), *configs])
        for op, size, run, configs in found
    ]
