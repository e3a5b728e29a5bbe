"""A grid of integers: every group of weights of a row has a scale s and a zero point z, and a
weight is one of  s · (q - z),  q = 0 … 2^bits - 1.

Asymmetric: the range of a group need not be centred on zero, and of so few values a symmetric
one leaves more unused. The range is that of the group with zero in it, or the part of it with the
least squared error: then a value outside is clipped, and all others are closer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

_SHRINK = [1 - step / 20 for step in range(1, 11)]  # 0.95 to 0.5 of the range of a group
_SCALE_BITS = 16


@dataclass(frozen=True)
class Grid:
    """`bits` bits a weight, and for every `group` weights of a row a bfloat16 scale and a zero
    point of `bits` bits.
    """

    bits: int
    group: int = 64

    @property
    def top(self) -> int:
        """The largest integer."""
        return (1 << self.bits) - 1

    def nbytes(self, rows: int, columns: int) -> int:
        """Of a weight `[rows, columns]` with its scales and zero points."""
        groups = -(-columns // self.group)
        return -(-rows * (columns * self.bits + groups * (_SCALE_BITS + self.bits)) // 8)

    def fitted(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and zero point, float32 `[…, 1]` both, of groups of weights, float32 `[…, group]`.

        A group of zeros has scale 1.
        """
        low = weights.amin(-1, keepdim=True).clamp_max(0)
        high = weights.amax(-1, keepdim=True).clamp_min(0)
        scale, zero = self._of_range(low, high)
        least = self._error(weights, scale, zero)
        for share in _SHRINK:
            other = self._of_range(low * share, high * share)
            error = self._error(weights, *other)
            better = error < least
            least = torch.where(better, error, least)
            scale, zero = torch.where(better, other[0], scale), torch.where(better, other[1], zero)
        return scale, zero

    def _error(self, weights: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        return (self.rounded(weights, scale, zero) - weights).square().sum(-1, keepdim=True)

    def _of_range(self, low: Tensor, high: Tensor) -> tuple[Tensor, Tensor]:
        scale = ((high - low) / self.top).bfloat16().float()
        scale = torch.where(scale > 0, scale, torch.ones_like(scale))
        return scale, (-low / scale).round().clamp(0, self.top)

    def rounded(self, weights: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
        """The values of the grid next to `weights`; all float32, `scale` and `zero` as `fitted`
        gives them.
        """
        return ((weights / scale).round().add_(zero).clamp_(0, self.top) - zero) * scale


def nearest(weight: Tensor, grid: Grid) -> Tensor:
    """`weight` `[out, in]` rounded to the nearest values of the grid of each group, in its dtype.

    The last group of a row is shorter where `in` is no multiple of the group.
    """
    rows, columns = weight.shape
    groups = pad(weight.float(), (0, -columns % grid.group)).view(rows, -1, grid.group)
    rounded = grid.rounded(groups, *grid.fitted(groups))
    return rounded.view(rows, -1)[:, :columns].to(weight.dtype)
