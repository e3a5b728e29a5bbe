"""Exact reconstruction: the best values for the weights that are kept, the mask fixed.

Every output row w with kept set K is its own least-squares problem (the layer-wise objective of
Frantar & Alistarh, SparseGPT, https://arxiv.org/abs/2301.00774, eq. 1-2, which SparseGPT itself
solves greedily, one column after another):

    min over x, x_j = 0 outside K, of  (w - x)(G + λI)(w - x)ᵀ          G = XᵀX,  λ = damping ·
                                       mean(diag G)

whose solution x_K = [(w(G + λI))_K] [(G + λI)_KK]⁻¹ would take one factorisation a row. Conjugate
gradients on the masked system need products with G only, and those are one matrix product for all
rows; preconditioned with the diagonal (Meng et al., ALPS, https://arxiv.org/abs/2406.07831, section
3.3, solve the same problem the same way). Each step lowers the damped error of every row; a row
whose true error did not fall is left as it was.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.pattern import Pattern
from compressor.refine.quadratic import Quadratic, better_rows, row_chunks
from compressor.stats import InputStats

NEEDS_GRAM = True
NEEDS_MOMENTS = False

_CONVERGED = 1e-14  # of the squared residual at the start: what float32 can resolve


@torch.no_grad()
def refine(
    weight: Tensor,
    pruned: Tensor,
    stats: InputStats,
    pattern: Pattern,
    *,
    iterations: int = 60,
    damping: float = 0.01,
) -> Tensor:
    """Refit the non-zero weights of `pruned`; its zeros stay zero.

    Args:
        weight: `[out, in]`, before pruning.
        pruned: `[out, in]`, same dtype; its non-zeros are the mask.
        stats: with `gram`.
        pattern: not needed, the mask is that of `pruned`.
        iterations: conjugate-gradient steps.
        damping: λ in units of the mean of the diagonal of G.

    Returns:
        `[out, in]` in the dtype of `pruned`: no row has a larger output error ‖X(w - ŵ)ᵀ‖² than in
        `pruned`.
    """
    quadratic = Quadratic(stats, damping)
    refined = torch.empty_like(pruned)
    for rows in row_chunks(weight):
        start = pruned[rows]
        solved = solve(quadratic, weight[rows].float(), start.float(), start != 0, iterations)
        refined[rows] = better_rows(quadratic, weight[rows], start, solved)
    return refined


def solve(
    quadratic: Quadratic, weight: Tensor, start: Tensor, mask: Tensor, iterations: int
) -> Tensor:
    """Masked Jacobi-preconditioned conjugate gradients from `start`, all rows at once.

    Args:
        quadratic: G + λI.
        weight: float32 `[rows, in]`, the target.
        start: float32 `[rows, in]`, zero outside the mask.
        mask: bool `[rows, in]`, True = kept.
        iterations: steps; a row that has converged stands still.

    Returns:
        float32 `[rows, in]`, zero outside the mask.
    """
    solution = start.clone()
    residual = quadratic.times(weight - start) * mask
    scaled = residual / quadratic.diagonal
    direction = scaled
    fall = torch.linalg.vecdot(residual, scaled)[:, None]
    floor = fall * _CONVERGED
    for _ in range(iterations):
        image = quadratic.times(direction) * mask
        step = _ratio(fall, torch.linalg.vecdot(direction, image)[:, None], fall > floor)
        solution.addcmul_(direction, step)
        residual.addcmul_(image, step, value=-1)
        scaled = residual / quadratic.diagonal
        previous, fall = fall, torch.linalg.vecdot(residual, scaled)[:, None]
        direction = torch.addcmul(scaled, direction, _ratio(fall, previous, fall > floor))
    return solution


def _ratio(numerator: Tensor, denominator: Tensor, moving: Tensor) -> Tensor:
    """`numerator / denominator` where a row is moving, else 0: below the floor it would be a ratio
    of rounding errors.
    """
    return torch.where(
        moving & (denominator > 0), numerator / denominator, torch.zeros_like(numerator)
    )
