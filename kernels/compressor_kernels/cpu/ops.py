"""The ops of the CPU kernels as torch knows them: loaded, traced, and tried before use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor_kernels import reference
from compressor_kernels.cpu.tiles import to_tiles
from compressor_kernels.packing import pack24

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def sparse24(
    x: Tensor,
    values: Tensor,
    positions: Tensor,
    bias: Tensor | None,
    out_features: int,
    in_features: int,
) -> Tensor:
    """y = x Wᵀ + bias for a 2:4 weight in tiles: `[..., in]` -> `[..., out]`.

    A column that a row does not name is not multiplied: what is infinite or no number there does
    not reach that row.

    Raises:
        ValueError: shapes, dtypes, devices or strides do not fit.
    """
    op = torch.ops.compressor_kernels.cpu_sparse24.default
    return op(x, values, positions, bias, out_features, in_features)


def armor(
    x: Tensor, values: Tensor, positions: Tensor, a: Tensor, b: Tensor, bias: Tensor | None
) -> Tensor:
    """y = A (S (B x)) + bias, S in tiles; else as `sparse24`."""
    return torch.ops.compressor_kernels.cpu_armor.default(x, values, positions, a, b, bias)


def lowrank(x: Tensor, u: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """y = U (V x) + bias; else as `sparse24`."""
    return torch.ops.compressor_kernels.cpu_lowrank.default(x, u, v, bias)


def pivot(x: Tensor, v: Tensor, c: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
    """y[rows[:r]] = V x, y[rows[r:]] = C (V x), and the bias added; `rows` int64 `[out]`, a
    permutation. Else as `sparse24`.
    """
    return torch.ops.compressor_kernels.cpu_pivot.default(x, v, c, rows, bias)


def dense(x: Tensor, w: Tensor, bias: Tensor | None) -> Tensor:
    """y = W x + bias with a dense W by the kernel of the thin factors: what benchmarks compare
    `sparse24` with.
    """
    return torch.ops.compressor_kernels.cpu_dense.default(x, w, bias)


def load(path: Path | None) -> None:
    """Load the library at `path`; raises RuntimeError where its products are wrong."""
    torch.ops.load_library(str(path))
    products = (
        ("sparse24", 4),
        ("sparse24_by_panels", 4),
        ("armor", 3),
        ("lowrank", 1),
        ("pivot", 3),
        ("dense", 1),
    )
    for name, place in products:
        torch.library.register_fake(f"compressor_kernels::cpu_{name}", _fake(name, place))
    for dtype in DTYPES:
        if not _right(dtype):
            raise RuntimeError(f"the CPU kernels computed a wrong product in {dtype}")


def _fake(name: str, place: int) -> Any:
    def shape(x: Tensor, *others: Any) -> Tensor:
        if name.startswith("sparse24"):
            return x.new_empty(*x.shape[:-1], others[place - 1])
        sizes = others[place - 1].shape
        return x.new_empty(*x.shape[:-1], sizes[0] * sizes[1] if name == "armor" else sizes[0])

    return shape


def _right(dtype: torch.dtype) -> bool:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(11, 17, 4, generator=generator)
    weight = (weight * (weight.abs().argsort(-1).argsort(-1) > 1)).view(11, 68).to(dtype)
    values, metadata = pack24(weight)
    for rows in (1, 3, 16, 137):
        x = torch.randn(rows, 68, generator=generator).to(dtype)
        expected = reference.sparse24(x.double(), values.double(), metadata)
        y = sparse24(x, *to_tiles(values, metadata), None, 11, 68).double()
        bound = 1e-5 if dtype == torch.float32 else 1e-2  # far above rounding, far below an error
        if not (y - expected).norm() <= bound * expected.norm():
            return False
    return True
