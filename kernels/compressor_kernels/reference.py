"""The naive torch twin of each op: the truth that fast kernels are tested against, and what runs
without a GPU.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import linear

from compressor_kernels.packing import unpack24


def sparse24(x: Tensor, values: Tensor, metadata: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + bias for a packed 2:4 weight.

    Args:
        x: `[..., in]`.
        values: `[out, in / 2]`, the dtype of x.
        metadata: int16 `[out, ceil(in / 16)]`.
        bias: `[out]` or None.

    Returns:
        `[..., out]` in the dtype of x.
    """
    return linear(x, unpack24(values, metadata), bias)


def armor(
    x: Tensor, values: Tensor, metadata: Tensor, a: Tensor, b: Tensor, bias: Tensor | None = None
) -> Tensor:
    """y = A (S (B x)) + bias for a packed 2:4 core S between block-diagonal A and B.

    Args:
        x: `[..., in]`.
        values: `[out, in / 2]`, the dtype of x.
        metadata: int16 `[out, ceil(in / 16)]`.
        a: `[out / bA, bA, bA]`, the dtype of x.
        b: `[in / bB, bB, bB]`, the dtype of x.
        bias: `[out]` or None.

    Returns:
        `[..., out]` in the dtype of x.
    """
    y = block_diagonal(sparse24(block_diagonal(x, b), values, metadata), a)
    return y if bias is None else y + bias


def lowrank(x: Tensor, u: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """y = U (V x) + bias for a weight stored as a low-rank product U V.

    Args:
        x: `[..., in]`.
        u: `[out, r]`, the dtype of x.
        v: `[r, in]`, the dtype of x.
        bias: `[out]` or None.

    Returns:
        `[..., out]` in the dtype of x.
    """
    return linear(linear(x, v), u, bias)


def pivot(x: Tensor, v: Tensor, c: Tensor, rows: Tensor, bias: Tensor | None = None) -> Tensor:
    """y[rows[:r]] = V x, y[rows[r:]] = C (V x), and the bias added.

    Args:
        x: `[..., in]`.
        v: `[r, in]`, the dtype of x.
        c: `[out - r, r]`, the dtype of x.
        rows: int64 `[out]`, a permutation.
        bias: `[out]` or None.

    Returns:
        `[..., out]` in the dtype of x.
    """
    inner = linear(x, v)
    stacked = torch.cat([inner, linear(inner, c)], dim=-1)
    y = torch.empty_like(stacked).index_copy(-1, rows, stacked)
    return y if bias is None else y + bias


def block_diagonal(x: Tensor, blocks: Tensor) -> Tensor:
    """y = blockdiag(blocks) x.

    Args:
        x: `[..., features]`.
        blocks: `[features / size, size, size]`, the dtype of x.
    """
    count, size, _ = blocks.shape
    rows = x.reshape(-1, count, size).transpose(0, 1)
    return (rows @ blocks.transpose(1, 2)).transpose(0, 1).reshape(x.shape)
