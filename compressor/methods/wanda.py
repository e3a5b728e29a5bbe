"""Wanda: keep the weights of largest |W_ij| · ‖X_j‖₂ (Sun et al. 2023,
https://arxiv.org/abs/2306.11695, eq. 1).

Weights are compared within a row, or within each group of m for n:m; there is no weight update.
"""

from __future__ import annotations

from torch import Tensor

from compressor.formats.dense import Dense
from compressor.pattern import Pattern
from compressor.stats import InputStats

NEEDS_INPUTS = True
NEEDS_GRAM = False
REFINABLE = True


def compress(weight: Tensor, stats: InputStats, pattern: Pattern) -> Dense:
    """Prune `weight` `[out, in]` by the norms of its inputs; kept weights are untouched."""
    score = weight.abs().float() * stats.norm
    return Dense(weight.masked_fill(~pattern.mask(score), 0))
