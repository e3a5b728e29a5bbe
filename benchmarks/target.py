"""The target of a linear whose inputs have already been changed by the blocks before it.

Layer-wise pruning aims at XWᵀ, the dense weight on the inputs X of the model compressed so far. The
dense model itself gives X'Wᵀ, on its own inputs X'. The weight that comes closest to *that* from X
is (damped towards W)

    W* = W + strength · W Cᵀ (G + λI)⁻¹          G = XᵀX,  C = Xᵀ(X' - X),  λ = damping · mean(diag
                                                 G)

and for every Ŵ  ‖X'Wᵀ - XŴᵀ‖² = ‖X(W* - Ŵ)ᵀ‖² + constant  (strength 1, no damping): pruning and
                 refining W* in place of W
therefore corrects what the earlier blocks got wrong, with the same Gram matrix and no other change.
The same asymmetric objective is used for quantisation by Li et al., GPTAQ,
https://arxiv.org/abs/2504.02692, and Qronos, Zhang et al., https://arxiv.org/abs/2505.11695. It
needs X of the linears before it *inside* the block compressed too, so statistics are taken anew for
each group of linears that share an input.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.errors import NumericalError
from compressor.refine.quadratic import Quadratic
from compressor.stats import InputStats


@torch.no_grad()
def matched(
    weight: Tensor,
    stats: InputStats,
    cross: Tensor,
    *,
    strength: float = 0.5,
    damping: float = 0.01,
) -> Tensor:
    """The weight to prune in place of `weight`.

    Args:
        weight: `[out, in]`, dense.
        stats: of the inputs X of the compressed model, with `gram`.
        cross: float32 `[in, in]`, Xᵀ(X' - X) summed over the same tokens.
        strength: 0 gives `weight`, 1 the full correction; between the two less is fitted to the
            calibration text.
        damping: λ in units of the mean of the diagonal of G.

    Returns:
        `[out, in]` in the dtype of `weight`.

    Raises:
        NumericalError: the damped Gram matrix cannot be factored.
    """
    quadratic = Quadratic(stats, damping)
    factor, info = torch.linalg.cholesky_ex(quadratic.block(0, len(quadratic.gram)))
    if int(info):
        raise NumericalError(
            "the Gram matrix cannot be factored: give more calibration samples or raise the damping"
        )
    dense = weight.float()
    shift = torch.cholesky_solve(cross @ dense.T, factor).T
    return torch.add(dense, shift, alpha=strength).to(weight.dtype)
