"""Which operations of torch give other bits with another number of threads.

    python benchmarks/threads.py

Each of those that methods and blocks are made of, at several sizes, with 1, 2 and 4 threads, and
with one thread again: what differs there is not the threads' doing. Half a minute.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from common import emit
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention

from compressor.checkpoint.atomic import tensor_bytes

SIZES = (64, 128, 256, 512, 576, 1024)
ROWS, OUT = 2048, 384
Case = tuple[str, int, Callable[[], Any]]


def solvers(size: int, dtype: torch.dtype) -> Iterator[Case]:
    """What LAPACK does, and products with a Gram matrix."""
    wide = torch.randn(2 * size, size, dtype=dtype)
    gram = wide.T @ wide + torch.eye(size, dtype=dtype)
    lower, weight = torch.linalg.cholesky(gram), torch.randn(OUT, size, dtype=dtype)
    kind = str(dtype).removeprefix("torch.")
    yield f"cholesky {kind}", size, lambda: torch.linalg.cholesky(gram)
    yield f"cholesky_inverse {kind}", size, lambda: torch.cholesky_inverse(lower)
    yield f"eigh {kind}", size, lambda: torch.linalg.eigh(gram)
    yield f"svd {kind}", size, lambda: torch.linalg.svd(weight, full_matrices=False)
    solve = torch.linalg.solve_triangular
    yield f"solve_triangular {kind}", size, lambda: solve(lower, weight.T, upper=False)
    yield f"W G {kind}", size, lambda: weight @ gram
    yield f"G w {kind}", size, lambda: gram @ weight[0]


def passes(size: int, dtype: torch.dtype) -> Iterator[Case]:
    """What a block and its statistics are made of, and sums."""
    x, weight = torch.randn(ROWS, size).to(dtype), torch.randn(OUT, size).to(dtype)
    heads = torch.randn(2, 9, size, 64).to(dtype)
    kind = str(dtype).removeprefix("torch.")
    attend = scaled_dot_product_attention
    yield f"linear {kind}", size, lambda: linear(x, weight)
    yield f"linear of 3 rows {kind}", size, lambda: linear(x[:3], weight)
    yield f"attention {kind}", size, lambda: attend(heads, heads, heads, is_causal=True)
    yield f"softmax {kind}", size, lambda: x.softmax(-1)
    yield f"sum of columns {kind}", size, lambda: x.square().sum(0)
    yield f"sum of rows {kind}", size, lambda: x.square().sum(1)
    yield f"sum of all {kind}", size, x.sum
    if dtype == torch.float32:
        empty = torch.zeros(size, size)
        yield "Gram matrix", size, lambda: empty.addmm(x.T, x)
        yield "var_mean", size, lambda: torch.var_mean(x, 0)


def bits(found: Any) -> str:
    """Of the tensors that an operation gave."""
    tensors = [found] if isinstance(found, Tensor) else list(found)
    return hashlib.sha256(b"".join(map(bytes, map(tensor_bytes, tensors)))).hexdigest()


def main() -> None:
    torch.manual_seed(0)
    different: dict[str, list[int]] = {}
    for size in SIZES:
        cases = [*solvers(size, torch.float32), *solvers(size, torch.float64)]
        cases += [*passes(size, torch.float32), *passes(size, torch.bfloat16)]
        for name, at, run in cases:
            seen = []
            for threads in (1, 2, 4, 1):
                torch.set_num_threads(threads)
                seen.append(bits(run()))
            assert seen[0] == seen[-1], f"{name} {at} differs from itself"
            different.setdefault(name, [])
            if len(set(seen)) > 1:
                different[name].append(at)
    for name, sizes in different.items():
        emit({"operation": name, "different at": sizes})


if __name__ == "__main__":
    main()
