"""Is every kernel right on this GPU? Each against float64, at whatever sizes, with and without
overlapped launches.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compressor.bench.ahead import compile_ahead
from compressor.bench.kernels import random24
from compressor.bench.tune import describe, dot_configs
from compressor_kernels import backend, kernel_config
from compressor_kernels import sparse24 as sparse
from compressor_kernels.armor import run_armor
from compressor_kernels.fragments import Fragments, to_fragments
from compressor_kernels.lowrank import lowrank
from compressor_kernels.packing import pack24, unpack24
from compressor_kernels.pivot import pivot, row_order


class Case(NamedTuple):
    """One run of a kernel and the float64 result it should have."""

    name: str
    rows: int
    run: Callable[[], Tensor]
    expected: Tensor
    semaphore: Tensor | None = None


@torch.no_grad()
def check(
    device: torch.device, shapes: Iterable[tuple[int, int]], rows: Sequence[int]
) -> Iterator[dict[str, Any]]:
    """Rows with the error of each kernel; `ok` says whether it is below its bar, five times the
    same, and left no semaphore set.
    """
    for dtype, (n, k) in itertools.product((torch.bfloat16, torch.float16), shapes):
        weight, bias = random24(n, k, dtype, device), torch.randn(n, dtype=dtype, device=device)
        weight[: n // 2, :8] = 0  # groups without a value
        packed = pack24(weight)
        assert torch.equal(unpack24(*packed), weight)
        fragments, cases = to_fragments(*packed), _unpacked(packed, weight)
        for m in rows:
            x = torch.randn(m, k, dtype=dtype, device=device)
            cases += _cases(x, packed, fragments, weight, bias) + _factored(
                x, fragments, weight, bias
            )
        compile_ahead(case.run for case in cases)
        shape = {"out": n, "in": k, "dtype": str(dtype).removeprefix("torch.")}
        yield from (
            {**shape, **_checked(case, {torch.float16: 1e-3, torch.bfloat16: 5e-3}[dtype])}
            for case in cases
        )


def _unpacked(packed: tuple[Tensor, Tensor], weight: Tensor) -> list[Case]:
    runs = {
        "unpack_fragments": partial(sparse.unpack_fragments, to_fragments(*packed), *weight.shape),
        "unpack_stored": partial(sparse.unpack_stored, *packed),
    }
    return [Case(name, 0, run, weight.double()) for name, run in runs.items()]


def _cases(
    x: Tensor, packed: tuple[Tensor, Tensor], fragments: Fragments, weight: Tensor, bias: Tensor
) -> list[Case]:
    (n, k), m, device = weight.shape, len(x), x.device
    semaphore, expected = (
        sparse.new_semaphore(n, device),
        x.double() @ weight.double().T + bias.double(),
    )
    mma = {
        "kernel": "mma",
        "warps": 8,
        "stack": 1,
        "row_tiles": 1,
        "split": 1,
        "unroll": 1,
        "ordered": False,
    }
    found = []
    for config in (
        mma,
        {**mma, "stack": 2, "row_tiles": 2, "split": 3, "unroll": 2},
        {**mma, "stack": 4, "row_tiles": 2, "split": 4, "ordered": True},
        *(
            [{**mma, "split": 2, "pdl": True}, {**mma, "ordered": True, "pdl": True}]
            if backend.hopper(device)
            else []
        ),
        *([{"kernel": "gemv", "warps": 4, "split": 2}] if m == 1 else []),
        kernel_config.rule("fragments", n, k, m, backend.multiprocessors(device)),
    ):
        run = partial(sparse.run_fragments, x, fragments, n, bias, semaphore, config)
        found.append(Case(describe(config), m, run, expected, semaphore))
    for config in (
        kernel_config.rule("stored", n, k, m, backend.multiprocessors(device)),
        {**dot_configs(m)[0], "split": 2},
    ):
        run = partial(sparse.run_stored, x, *packed, bias, semaphore, config)
        found.append(Case(describe(config), m, run, expected, semaphore))
    return found


def _factored(x: Tensor, fragments: Fragments, weight: Tensor, bias: Tensor) -> list[Case]:
    (n, k), m, dtype, device = weight.shape, len(x), x.dtype, x.device
    u, v = (
        torch.randn(n, 48, dtype=dtype, device=device) / 7,
        torch.randn(48, k, dtype=dtype, device=device) / k**0.5,
    )
    semaphore = sparse.new_semaphore(max(n, 48), device)
    expected = x.double() @ v.double().T @ u.double().T + bias.double()
    found = [Case("lowrank", m, partial(lowrank, x, u, v, bias, semaphore), expected, semaphore)]
    rows = row_order(torch.arange(0, n, -(-n // 48), device=device), n)
    rank = len(range(0, n, -(-n // 48)))
    parts = v[:rank], u[rank:, :rank].contiguous(), rows
    inner = x.double() @ parts[0].double().T
    by_pivots = torch.cat([inner, inner @ parts[1].double().T], -1)[:, rows.argsort()]
    run = partial(pivot, x, *parts, bias, semaphore)
    found.append(Case("pivot", m, run, by_pivots + bias.double(), semaphore))
    if n % 128 == 0 and k % 128 == 0 and m <= 64:
        a, b = (
            torch.randn(size // 128, 128, 128, dtype=dtype, device=device) / 128**0.5
            for size in (n, k)
        )
        inner = (x.double().view(m, -1, 1, 128) @ b.double().transpose(1, 2)).reshape(m, k)
        outer = (
            (inner @ weight.double().T).view(m, -1, 1, 128) @ a.double().transpose(1, 2)
        ).reshape(m, n) + bias.double()
        usual = kernel_config.rule("armor", n, k, m, backend.multiprocessors(device))
        for config, pdl in itertools.product(
            (usual, {**usual, "stack": 4, "row_tiles": 2, "split": 4}), (False, True)
        ):
            if not pdl or backend.hopper(device):
                run = partial(
                    run_armor, x, fragments, a, b, bias, semaphore, {**config, "pdl": pdl}
                )
                found.append(
                    Case(f"armor {describe({**config, 'pdl': pdl})}", m, run, outer, semaphore)
                )
    return found


def _checked(case: Case, bar: float) -> dict[str, Any]:
    row: dict[str, Any] = {"kernel": case.name, "rows": case.rows}
    try:
        results = [case.run() for _ in range(5)]
        torch.cuda.synchronize()
        error = float((results[0].double() - case.expected).norm() / case.expected.norm())
        same = all(torch.equal(results[0], other) for other in results[1:])
        clean = case.semaphore is None or not bool(case.semaphore.any())
    except Exception as error:  # whatever it is, it is the result of this check
        return {**row, "ok": False, "error": f"{type(error).__name__}: {error}"[:300]}
    right = error <= (bar if case.rows else 0.0) and same and clean
    return {**row, "ok": right, "rms": error, "deterministic": same, "semaphore_zero": clean}
