"""The naive torch twin of each op: the truth that fast kernels are tested against, and what runs without a GPU."""

from __future__ import annotations

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
