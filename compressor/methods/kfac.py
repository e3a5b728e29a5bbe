"""Two-sided whitening: truncation in the metric of the loss (K-FAC, Martens and Grosse 2015, https://arxiv.org/abs/1503.05671).

To second order the loss rises by ½ E (gᵀ ΔW x)², x the input and g the gradient at the output. With A = E x xᵀ = R Rᵀ and
B = E g gᵀ = L Lᵀ, taken as independent, that is ½ ‖Lᵀ ΔW R‖²: truncating M = Lᵀ W R is optimal, and the squares of its dropped
singular values are rises of the loss in one unit for all linears. So one threshold on S² / (out + in) decides all ranks
(compressor/ranks/threshold.py).
"""

from __future__ import annotations

from torch import Tensor

from compressor.formats.lowrank import LowRank
from compressor.methods.factor import check_damp, root, singular_values, truncate, whiten
from compressor.stats import InputStats

NEEDS_INPUTS = True
NEEDS_GRAM = True
REFINABLE = False
NEEDS_GRADIENTS = True
RANKS = "threshold"


def spectrum(weight: Tensor, stats: InputStats, gradients: Tensor, *, damp: float = 1e-6, gradient_damp: float = 1e-3) -> Tensor:
    """σ(Lᵀ W R), `[min(out, in)]`: their squares are comparable between linears."""
    left, right = _roots(stats, gradients, damp, gradient_damp)
    return singular_values(whiten(weight, left, right))


def compress(
    weight: Tensor, stats: InputStats, rank: int, gradients: Tensor, *, damp: float = 1e-6, gradient_damp: float = 1e-3
) -> LowRank:
    """Factor `weight` `[out, in]`.

    Args:
        weight: `[out, in]`.
        stats: of its inputs, with the Gram matrix.
        rank: of the factors.
        gradients: `[out, out]`, Σ over tokens of g gᵀ.
        damp: added to the diagonal of A, as a fraction of its mean.
        gradient_damp: the same for B.

    Raises:
        UsageError: a damp that is not above 0.
        NumericalError: a Gram matrix cannot be factored.
    """
    check_damp(damp)
    check_damp(gradient_damp)
    left, right = _roots(stats, gradients, damp, gradient_damp)
    return truncate(weight, rank, left=left, right=right)


def _roots(stats: InputStats, gradients: Tensor, damp: float, gradient_damp: float) -> tuple[Tensor, Tensor]:
    """L and R; A is a mean over tokens and B a sum, so that linears that see fewer tokens, as experts do, count for less."""
    assert stats.gram is not None
    return root(gradients, gradient_damp), root(stats.gram.double() / max(stats.tokens, 1), damp)
