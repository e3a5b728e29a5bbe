"""The factor by which SparseGPT and GPTQ make later columns pay for earlier ones.

With H = 2/N XᵀX + damping and the upper Cholesky factor U of its inverse (UᵀU = H⁻¹), U_jj² is the
j-th diagonal of the inverse of H restricted to columns j and after, so changing w_j by e costs
e² / U_jj², and the best update of the columns after it is -(e / U_jj) · U_j,after (Frantar and
Alistarh 2023, https://arxiv.org/abs/2301.00774, algorithm 1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.errors import NumericalError
from compressor.stats import InputStats

_TRIES = 4  # the damping is raised tenfold after each Cholesky that fails


def inverse_factor(stats: InputStats, damp: float) -> tuple[Tensor, Tensor]:
    """U, upper triangular, UᵀU = (H + damping)⁻¹, and which inputs are dead.

    Args:
        stats: of the inputs, with the Gram matrix.
        damp: added to the diagonal of H, as a fraction of its mean.

    Returns:
        float32 `[in, in]`; bool `[in]`, true where an input was always zero: there H has a 1.

    Raises:
        NumericalError: H cannot be factored even at a thousand times the damping.
    """
    assert stats.gram is not None
    H = stats.gram * (2 / stats.tokens)
    dead = H.diagonal() == 0
    H.diagonal()[dead] = 1
    mean = H.diagonal().mean()
    for step in range(_TRIES):
        damped = H.clone()
        damped.diagonal().add_(damp * 10**step * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper, dead
    raise NumericalError(
        f"the Gram matrix cannot be factored even with damp={damp * 10 ** (_TRIES - 1):g}: "
        "give more calibration samples or raise damp"
    )
