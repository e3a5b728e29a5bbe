"""Two-sided whitening: truncation in the metric of the loss, its Fisher information taken as a
Kronecker product.

A and B are the Kronecker factors of the Fisher information, its nearest product after one step of
the power method (compressor/allocation/rank/fisher_factors.py says why not those of K-FAC, Martens
and Grosse 2015, https://arxiv.org/abs/1503.05671). With A / tr A = R Rᵀ and B = L Lᵀ the rise of
the loss is ½ ‖Lᵀ ΔW R‖²: truncating M = Lᵀ W R is optimal, and the squares of its dropped singular
values are rises of the loss in one unit for all linears. So one price of a parameter
decides all ranks (compressor/allocation/rank/threshold.py).
"""

from __future__ import annotations

from torch import Tensor

from compressor.errors import NumericalError
from compressor.methods import factor
from compressor.methods.factor import Factors, check_damp, root

NEEDS_INPUTS = True
NEEDS_GRAM = False
REFINABLE = False
NEEDS_GRADIENTS = True
RANKS = "threshold"


def decompose(
    weight: Tensor,
    rank: int,
    inputs: Tensor,
    outputs: Tensor,
    *,
    damp: float = 1e-6,
    gradient_damp: float = 1e-3,
) -> tuple[Factors, Tensor]:
    """Factor `weight` `[out, in]`; gives the factors and all singular values of M, float64
    `[min(out, in)]`.

    Args:
        weight: `[out, in]`.
        rank: of the factors; those of a lower one are their first columns.
        inputs: A, `[in, in]`.
        outputs: B, `[out, out]`.
        damp: added to the diagonal of A, as a fraction of its mean.
        gradient_damp: the same for B.

    Raises:
        UsageError: a damp that is not above 0.
        NumericalError: A is zero, or one of them cannot be factored.
    """
    check_damp(damp)
    check_damp(gradient_damp)
    if not bool(inputs.any()):
        raise NumericalError("no gradient of the loss reaches it: leave it dense with `ignore`")
    scaled = inputs.double() / inputs.double().trace()
    return factor.decompose(weight, rank, root(outputs, gradient_damp), root(scaled, damp))
