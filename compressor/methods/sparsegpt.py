"""SparseGPT: prune column by column, and let the columns still to come make up for each error.

Frantar and Alistarh 2023, https://arxiv.org/abs/2301.00774, algorithm 1. With the factor U of
`inverse_factor`, pruning w_j costs w_j² / U_jj², and the columns after it change by
-(w_j / U_jj) · U_j,after.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.errors import UsageError
from compressor.formats.dense import Dense
from compressor.methods.inverse_factor import inverse_factor
from compressor.pattern import Pattern
from compressor.stats import InputStats

NEEDS_INPUTS = True
NEEDS_GRAM = True
REFINABLE = True


def compress(
    weight: Tensor,
    stats: InputStats,
    pattern: Pattern,
    *,
    damp: float = 0.01,
    block_size: int = 128,
) -> Dense:
    """Prune `weight` `[out, in]` and update what is kept; arithmetic in float32, result in the
    weight's dtype.

    Args:
        weight: `[out, in]`.
        stats: statistics of its inputs, with the Gram matrix.
        pattern: for a sparsity the comparison group is all rows of `block_size` columns.
        damp: added to the diagonal of H, as a fraction of its mean.
        block_size: columns between two updates of all columns after them; for n:m a multiple of m.

    Raises:
        UsageError: an option out of range.
        NumericalError: H cannot be factored even at a thousand times the damping.
    """
    if damp <= 0 or block_size < 1 or (pattern.m and block_size % pattern.m):
        raise UsageError(
            f"sparsegpt needs damp > 0 and a block_size that is a multiple of m: "
            f"damp={damp:g}, block_size={block_size}, pattern {pattern}"
        )
    W = weight.float().clone()
    U, dead = inverse_factor(stats, damp)
    W[:, dead] = 0
    for start in range(0, W.shape[1], block_size):
        stop = min(start + block_size, W.shape[1])
        errors = _prune_columns(
            W[:, start:stop], U[start:stop, start:stop], pattern.part(start, stop, W.shape[1])
        )
        W[:, stop:] -= errors @ U[start:stop, stop:]
    return Dense(W.to(weight.dtype))


def _prune_columns(W: Tensor, U: Tensor, pattern: Pattern) -> Tensor:
    """Prune the columns of one block in place, `W` `[out, b]`, `U` `[b, b]`; returns their scaled
    errors `[out, b]`.
    """
    errors = torch.zeros_like(W)
    scale = U.diagonal()
    mask = torch.ones_like(W, dtype=torch.bool)
    if not pattern.m:
        mask = pattern.mask_matrix((W / scale).square())
    for column in range(W.shape[1]):
        if pattern.m and column % pattern.m == 0:
            group = slice(column, column + pattern.m)
            mask[:, group] = pattern.mask((W[:, group] / scale[group]).square())
        w = W[:, column]
        errors[:, column] = w.masked_fill(mask[:, column], 0) / scale[column]
        W[:, column:] -= errors[:, column, None] * U[column, None, column:]
        W[:, column].masked_fill_(~mask[:, column], 0)
    return errors
