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
    W = weight.float().T.contiguous()  # `[in, out]`: a column of the weight is one piece of memory
    U, dead = inverse_factor(stats, damp)
    W[dead] = 0
    for start in range(0, len(W), block_size):
        stop = min(start + block_size, len(W))
        part = pattern.part(start, stop, len(W))
        errors = _prune_columns(W[start:stop], U[start:stop, start:stop], part)
        W[stop:].addmm_(U[start:stop, stop:].T, errors, alpha=-1)
    return Dense(W.T.to(weight.dtype).contiguous())


def _prune_columns(W: Tensor, U: Tensor, pattern: Pattern) -> Tensor:
    """Prune one block in place, `W` `[b, out]`, `U` `[b, b]`; returns the scaled errors `[b,
    out]`.
    """
    errors, scale = torch.empty_like(W), U.diagonal()[:, None]
    mask = torch.empty_like(W, dtype=torch.bool)
    if not pattern.m:
        mask = pattern.mask_matrix((W / scale).square().T).T.contiguous()
    for column in range(len(W)):
        if pattern.m and column % pattern.m == 0:
            group = slice(column, column + pattern.m)
            mask[group] = pattern.mask((W[group] / scale[group]).square().T).T
        pruned = W[column].masked_fill(mask[column], 0)
        torch.div(pruned, scale[column], out=errors[column])
        W[column + 1 :] -= U[column, column + 1 :, None] * errors[column]
        W[column] -= pruned
    return errors
