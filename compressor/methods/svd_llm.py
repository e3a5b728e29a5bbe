"""SVD-LLM: truncation of the weight whitened by its inputs (Wang et al. 2024,
https://arxiv.org/abs/2403.07378).

With XᵀX = R Rᵀ the error of the outputs is ‖X (W - U V)ᵀ‖ = ‖(W - U V) R‖_F, so truncating W R is
optimal and its dropped singular values are the error. Ranks are uniform in the paper: k = keep ·
out · in / (out + in).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from compressor.formats.pivot import Pivot
from compressor.methods.factor import UNUSED, check_damp, root, singular_values, truncate, whiten
from compressor.stats import InputStats

NEEDS_INPUTS = True
NEEDS_GRAM = True
REFINABLE = False
NEEDS_GRADIENTS = False
RANKS = "uniform"


def spectrum(weight: Tensor, stats: InputStats, *, damp: float = 1e-6) -> Tensor:
    """σ(W R), `[min(out, in)]`, for the sum over tokens; zeros where no input is ever other than
    zero.
    """
    right = _root(stats, damp)
    values = singular_values(whiten(weight, None, right))
    return torch.zeros_like(values) if right is None else values


def compress(weight: Tensor, stats: InputStats, rank: int, *, damp: float = 1e-6) -> Pivot:
    """Factor `weight` `[out, in]`.

    Args:
        weight: `[out, in]`.
        stats: of its inputs, with the Gram matrix.
        rank: of the factors.
        damp: added to the diagonal of the Gram matrix, as a fraction of its mean.

    Raises:
        UsageError: damp not above 0.
        NumericalError: the Gram matrix cannot be factored.
    """
    check_damp(damp)
    right = _root(stats, damp)
    factors = truncate(weight, rank, right=right)
    return replace(factors, note=UNUSED) if right is None else factors


def _root(stats: InputStats, damp: float) -> Tensor | None:
    """R; None where no input is ever other than zero."""
    assert stats.gram is not None
    return root(stats.gram, damp) if bool(stats.norm.any()) else None
