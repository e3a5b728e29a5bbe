"""SVD of the weight with its columns scaled by the size of their inputs (after ASVD,
https://arxiv.org/abs/2312.05821).

W S with S_jj = (rms of x_j)^alpha is truncated, and S taken out of V again. The paper takes the
mean of |x_j|, and chooses ranks by the perplexity of every linear at every rank; here they are
uniform unless `--ranks` says otherwise.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from compressor.errors import UsageError
from compressor.formats.pivot import Pivot
from compressor.methods.factor import UNUSED, singular_values, truncate, whiten
from compressor.stats import InputStats

NEEDS_INPUTS = True
NEEDS_GRAM = False
REFINABLE = False
NEEDS_GRADIENTS = False
RANKS = "uniform"


def spectrum(weight: Tensor, stats: InputStats, *, alpha: float = 0.5) -> Tensor:
    """σ(W S), `[min(out, in)]`; zeros where no input is ever other than zero."""
    values = singular_values(whiten(weight, None, _scale(stats, alpha)))
    return values if bool(stats.norm.any()) else torch.zeros_like(values)


def compress(weight: Tensor, stats: InputStats, rank: int, *, alpha: float = 0.5) -> Pivot:
    """Factor `weight` `[out, in]`.

    Args:
        weight: `[out, in]`.
        stats: of its inputs.
        rank: of the factors.
        alpha: power of the size of the inputs; 0 is the plain SVD.

    Raises:
        UsageError: alpha below 0.
    """
    if alpha < 0:
        raise UsageError(f"alpha is {alpha:g}; accepted: 0 or more")
    factors = truncate(weight, rank, right=_scale(stats, alpha))
    return factors if bool(stats.norm.any()) else replace(factors, note=UNUSED)


def _scale(stats: InputStats, alpha: float) -> Tensor:
    """The diagonal of S, float64 `[in]`. An input that is always zero counts as a millionth of the
    largest; where all are, S is the identity.
    """
    rms = stats.norm.double() / max(stats.tokens, 1) ** 0.5
    if not bool(rms.any()):
        return torch.ones_like(rms)
    return torch.maximum(rms, rms.max() * 1e-6) ** alpha
