"""Magnitude pruning: keep the weights of largest |W|. The baseline every other method must beat.

n:m compares within each group; a sparsity compares over the whole matrix (Han et al. 2015,
https://arxiv.org/abs/1506.02626).
"""

from __future__ import annotations

from torch import Tensor

from compressor.formats.dense import Dense
from compressor.pattern import Pattern
from compressor.stats import InputStats

NEEDS_INPUTS = False
NEEDS_GRAM = False
REFINABLE = True


def compress(weight: Tensor, stats: InputStats | None, pattern: Pattern) -> Dense:
    """Prune `weight` `[out, in]`; kept weights are untouched. `stats` is not used."""
    return Dense(weight.masked_fill(~pattern.mask_matrix(weight.abs().float()), 0))
