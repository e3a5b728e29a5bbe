"""Re-selection: the exactly best n of every group of m given all other groups, alternated with
exact reconstruction.

The damped error of a row x is quadratic. With the other groups fixed, and t = ((w - x)(G + λI))_g +
x_g H_g the pull on group g with its own part taken out (H_g the m x m diagonal block of G + λI),
keeping the set p of n weights is best done with x_p = H_pp⁻¹ t_p and lowers the error by t_p H_pp⁻¹
t_pᵀ. All m-choose-n sets are tried: coordinate descent whose coordinate is a whole group, mask
included. The groups are visited in order, the residual is kept up to date, and each sweep ends with
the conjugate gradients of `lsq`. Every step lowers the damped error or leaves it.

The layer-wise objective is that of SparseGPT (https://arxiv.org/abs/2301.00774, eq. 1), which
chooses the same masks greedily, once, and only looking ahead.
"""

from __future__ import annotations

import math
from itertools import combinations

import torch
from torch import Tensor

from compressor.errors import UsageError
from compressor.pattern import Pattern
from compressor.refine.lsq import solve
from compressor.refine.quadratic import Quadratic, better_rows, row_chunks
from compressor.stats import InputStats

NEEDS_GRAM = True
NEEDS_MOMENTS = False

# columns whose residual is updated at once by small products; the rest follows in one large one
_BLOCK = 128
_MOST_MASKS = 256  # of one group: 4:8 has 70, 8:16 has 12870


@torch.no_grad()
def refine(
    weight: Tensor,
    pruned: Tensor,
    stats: InputStats,
    pattern: Pattern,
    *,
    rounds: int = 3,
    iterations: int = 60,
    damping: float = 0.01,
) -> Tensor:
    """Choose anew which n of every m weights are kept, and with which values.

    Args:
        weight: `[out, in]`, before pruning.
        pruned: `[out, in]`, same dtype, legal: the start.
        stats: with `gram`.
        pattern: n:m with at most 256 masks a group.
        rounds: sweeps over all groups.
        iterations: conjugate-gradient steps before the first sweep and after each.
        damping: λ in units of the mean of the diagonal of G.

    Returns:
        `[out, in]` in the dtype of `pruned`, legal under `pattern`: no row has a larger output
        error than in `pruned`.

    Raises:
        UsageError: the pattern is unstructured or has too many masks.
    """
    check_pattern(pattern)
    quadratic = Quadratic(stats, damping)
    selectors = Selectors(quadratic, pattern)
    refined = torch.empty_like(pruned)
    for rows in row_chunks(weight):
        target, start = weight[rows].float(), pruned[rows]
        current = solve(quadratic, target, start.float(), start != 0, iterations)
        for _ in range(rounds):
            current = sweep(quadratic, selectors, target, current)
            current = solve(quadratic, target, current, current != 0, iterations)
        refined[rows] = better_rows(quadratic, weight[rows], start, current)
    return refined


def check_pattern(pattern: Pattern) -> None:
    """Raise UsageError where the groups of `pattern` cannot be searched exhaustively."""
    masks = math.comb(pattern.m, pattern.n) if pattern.m else 0
    if not 0 < masks <= _MOST_MASKS:
        found = f"{pattern} has {masks} masks a group" if masks else f"{pattern} has no groups"
        raise UsageError(
            f"`refine='swap'` tries every mask of a group, at most {_MOST_MASKS}; {found}; use "
            f"`refine='admm'` or `refine='lsq'`"
        )


def sweep(quadratic: Quadratic, selectors: Selectors, weight: Tensor, current: Tensor) -> Tensor:
    """Re-select every group once, in order, each given all the others.

    Args:
        quadratic: G + λI.
        selectors: of the same quadratic.
        weight: float32 `[rows, in]`, the target.
        current: float32 `[rows, in]`, legal.

    Returns:
        float32 `[rows, in]`, legal; no row has a larger damped error than in `current`.
    """
    m, columns = selectors.m, weight.shape[1]
    block = max(1, _BLOCK // m) * m
    residual = quadratic.times(
        weight - current
    )  # from scratch: what rounding has added up in one sweep ends with it
    current = current.clone()
    for start in range(0, columns, block):
        stop = min(start + block, columns)
        gram = quadratic.block(start, stop)
        before = current[:, start:stop].clone()
        inside, width = residual[:, start:stop], stop - start
        for first in range(0, width, m):
            last = first + m
            group = current[:, start + first : start + last]
            pull = torch.addmm(inside[:, first:last], group, gram[first:last, first:last])
            best = selectors.best(pull, (start + first) // m)
            inside[:, last:] -= (best - group) @ gram[first:last, last:width]
            group.copy_(best)
        residual[:, stop:] -= (current[:, start:stop] - before) @ gram[:, width:]
    return current


class Selectors:
    """H_pp⁻¹ for every group and every set p of n of its m columns; they depend on the input alone,
    so all rows share them.

    Attributes:
        m: columns of a group.
        sets: int64 `[sets, n]`, the columns each set keeps.
        inverses: float32 `[groups, sets, n, n]`.
    """

    def __init__(self, quadratic: Quadratic, pattern: Pattern) -> None:
        device, self.m = quadratic.gram.device, pattern.m
        self.sets = torch.tensor(list(combinations(range(pattern.m), pattern.n)), device=device)
        starts = torch.arange(0, len(quadratic.gram), pattern.m, device=device)
        members = starts[:, None, None] + self.sets
        within = quadratic.gram[members[..., :, None], members[..., None, :]]
        # n zero rows (dead columns, no damping) have no inverse: a diagonal of 1 gives them the
        # weight 0
        diagonal = quadratic.diagonal[members]
        within.diagonal(dim1=-2, dim2=-1).copy_(diagonal)
        self.inverses = torch.linalg.inv_ex(within)[0]

    def best(self, pull: Tensor, group: int) -> Tensor:
        """The best legal values of one group.

        Args:
            pull: float32 `[rows, m]`, t of the module's formula.
            group: its index.

        Returns:
            float32 `[rows, m]` with n values other than zero.
        """
        chosen = pull[:, self.sets].transpose(0, 1)
        values = chosen @ self.inverses[group]
        gain = torch.linalg.vecdot(values, chosen)
        index = gain.argmax(0)
        picked = values[index, torch.arange(len(pull), device=pull.device)]
        return torch.zeros_like(pull).scatter_(1, self.sets[index], picked)
