"""GPTQ: round column by column, and let the columns still to come make up for each error.

Frantar et al. 2023, https://arxiv.org/abs/2210.17323, algorithm 1, with a grid for every group of
columns, fitted to their weights as they are when the group begins. With the factor U of
`inverse_factor`, which SparseGPT uses alike, rounding w_j to q_j changes the columns after it by
-((w_j - q_j) / U_jj) · U_j,after.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.methods.inverse_factor import inverse_factor
from compressor.quantisation.grid import Grid
from compressor.stats import InputStats


def gptq(weight: Tensor, stats: InputStats, grid: Grid, *, damp: float = 0.01) -> Tensor:
    """`weight` `[out, in]` rounded to the grid; arithmetic in float32, result in its dtype.

    Args:
        weight: `[out, in]`.
        stats: of its inputs, with the Gram matrix.
        grid: of the values.
        damp: added to the diagonal of H, as a fraction of its mean.

    Raises:
        NumericalError: H cannot be factored even at a thousand times the damping.
    """
    W = weight.float().clone()
    U, _ = inverse_factor(stats, damp)
    for start in range(0, W.shape[1], grid.group):
        stop = min(start + grid.group, W.shape[1])
        errors = _round_columns(W[:, start:stop], U[start:stop, start:stop], grid)
        W[:, stop:] -= errors @ U[start:stop, stop:]
    return W.to(weight.dtype)


def _round_columns(W: Tensor, U: Tensor, grid: Grid) -> Tensor:
    """Round the columns of one group in place, `W` `[out, g]`, `U` `[g, g]`; returns their scaled
    errors `[out, g]`.
    """
    scale, zero = grid.fitted(W)
    errors = torch.zeros_like(W)
    for column in range(W.shape[1]):
        w = W[:, column, None]
        rounded = grid.rounded(w, scale, zero)
        errors[:, column, None] = (w - rounded) / U[column, column]
        W[:, column + 1 :] -= errors[:, column, None] * U[column, None, column + 1 :]
        W[:, column, None] = rounded
    return errors
