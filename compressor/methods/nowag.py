"""NoWag-P: Wanda on the normalised weight (Liu et al. 2025, https://arxiv.org/abs/2504.14569).

With column norms c_j = ‖W_:j‖ + ε taken first and row norms r_i of W / c second, W̄_ij = W_ij /
(r_i c_j) is scored by W̄_ij² h_j, h_j = ‖X_j‖². Weights compete within a row or a group of a row,
where r_i is common to all: what is computed is
|W_ij| ‖X_j‖ / c_j, Wanda's score over the norm of the weight's column. There is no weight update.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.formats.dense import Dense
from compressor.pattern import Pattern
from compressor.stats import InputStats

NEEDS_INPUTS = True
NEEDS_GRAM = False
REFINABLE = True
_EPSILON = 1e-5  # added to each norm, not inside its root


def compress(weight: Tensor, stats: InputStats, pattern: Pattern) -> Dense:
    """Prune `weight` `[out, in]` by its normalised score; kept weights are untouched."""
    return Dense(weight.masked_fill(~pattern.mask(score(weight, stats)), 0))


def score(weight: Tensor, stats: InputStats) -> Tensor:
    """|W_ij| ‖X_j‖ / c_j, float32 `[out, in]`."""
    wide = weight.float()
    return wide.abs() * (stats.norm / (wide.norm(dim=0) + _EPSILON))


def norms(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Row norms r `[out, 1]` and column norms c `[in]` of the normaliser: W = r · W̄ · c."""
    columns = weight.norm(dim=0) + _EPSILON
    rows = (weight / columns).norm(dim=1, keepdim=True) + _EPSILON
    return rows, columns


def normalised_loss(weight: Tensor, compressed: Tensor, h: Tensor) -> Tensor:
    """Σ_ij (W̄ - Ŵ̄)²_ij h_j, 0-d: the loss that NoWag-P and ARMOR's paper minimise."""
    rows, columns = norms(weight)
    return (((weight - compressed) / (rows * columns)).square() * h).sum(dtype=torch.float64)
