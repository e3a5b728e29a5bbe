"""DSnoT: kept and pruned weights change places until the expected output of every row is that of
the dense row.

Zhang, Zhao et al., Dynamic Sparse No Training, https://arxiv.org/abs/2310.08915. No weight gets a
new value, and only the mean of the input matters. With μ_j the mean and v_j the variance of input j
over tokens, row r misses

    err_r = Σ_j (W_rj - Ŵ_rj) μ_j

of its expected output. Up to `cycles` times per row:

    grow    if err > 0 the pruned weight with the largest  W_rj μ_j / v_j^p > 0  that is left, else
            the most negative one
    prune   unstructured: the kept weight with the smallest Wanda score |Ŵ_rj| ‖X_j‖ that is left,
            among those with Ŵ_rj μ_j < 0 if err >= 0, else among those > 0;  n:m: that with the
            smallest score in the group that grows
    stop    when |err| <= threshold, or (same_sign; always for n:m) when the exchange would turn the
            sign of err
    swap    err += Ŵ_r,prune μ_prune - W_r,grow μ_grow

A weight changes place once at most. The rule is guarded: a row stops when a list it needs is
exhausted, an input that never varies (v = 0: a dead channel, or a single token) is never regrown, a
group without an original weight left to prune is passed over, and a row that ends with |err| larger
than both its start and the threshold is put back. So the quota of every row and group is kept, at
any width. Where the pruned weight carries updated values (SparseGPT), these are the Ŵ above, and a
weight that grows comes back with its dense value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.pattern import Pattern
from compressor.refine.quadratic import row_chunks
from compressor.stats import InputStats

NEEDS_GRAM = False
NEEDS_MOMENTS = True


@torch.no_grad()
def refine(
    weight: Tensor,
    pruned: Tensor,
    stats: InputStats,
    pattern: Pattern,
    *,
    cycles: int = 50,
    threshold: float = 5e-5,
    variance_power: float = 1.0,
    same_sign: bool = True,
) -> Tensor:
    """Exchange weights of `pruned` for weights of `weight` until the expected outputs agree.

    Args:
        weight: `[out, in]`, before pruning.
        pruned: `[out, in]`, same dtype; its non-zeros are the mask.
        stats: mean and variance; no `gram` needed.
        pattern: for n:m a weight changes place with one of its own group.
        cycles: most exchanges of a row.
        threshold: |err| at which a row is done, for the mean over tokens (the reference's 0.1 is a
            sum over the 2048 tokens of a sequence: 5e-5).
        variance_power: p; 0 leaves the variance out.
        same_sign: stop a row before err changes its sign; n:m always does.

    Returns:
        `[out, in]` in the dtype of `pruned`, with as many zeros in every row (and group).
    """
    refined = torch.empty_like(pruned)
    for rows in row_chunks(weight):
        lists = _Lists(weight[rows], pruned[rows], stats, bool(pattern.m), cycles, variance_power)
        mask = _exchange(lists, pattern, cycles, threshold, same_sign)
        values = torch.where(lists.mask, pruned[rows], weight[rows])
        refined[rows] = values.masked_fill_(~mask, 0)
    return refined


def _exchange(
    lists: _Lists, pattern: Pattern, cycles: int, threshold: float, same_sign: bool
) -> Tensor:
    """The cycles of all rows at once; gives the new mask, bool `[rows, in]`."""
    start = error = lists.error
    mask = lists.mask.clone()
    active = torch.ones_like(error, dtype=torch.bool)
    for _ in range(cycles):
        grow, listed = lists.grow(error)
        prune, paired = lists.prune_in_group(grow, pattern.m) if pattern.m else lists.prune(error)
        changed = error + lists.present.gather(1, prune) - lists.missing.gather(1, grow)
        active &= listed & (error.abs() > threshold)
        if pattern.m:  # a group with nothing left to prune is passed over, the row goes on
            active &= ~paired | (changed.sign() == start.sign())
        else:
            active &= paired & ((changed.sign() == start.sign()) | (not same_sign))
        swap = active & paired
        error = torch.where(swap, changed, error)
        mask.scatter_(1, grow, mask.gather(1, grow) | swap)
        mask.scatter_(1, prune, mask.gather(1, prune) & ~swap)
        lists.remove(prune, swap)
    worse = error.abs() > start.abs().clamp_min(threshold)
    return torch.where(worse, lists.mask, mask)


class _Lists:
    """What may grow and what may be pruned in every row, in order.

    Attributes:
        mask: bool `[rows, in]`, kept at the start.
        missing: float64 `[rows, in]`, W_rj μ_j where pruned and able to grow, else 0: what growing
            j would give back.
        present: float64 `[rows, in]`, Ŵ_rj μ_j: what pruning j would take away.
        error: float64 `[rows, 1]`, err at the start.
    """

    def __init__(
        self,
        weight: Tensor,
        pruned: Tensor,
        stats: InputStats,
        grouped: bool,
        cycles: int,
        variance_power: float,
    ) -> None:
        variance = stats.m2 / max(stats.tokens, 1)
        self.mask = pruned != 0
        self.present = pruned * stats.mean
        dense = weight * stats.mean
        self.error = (dense - self.present).sum(1, keepdim=True)
        self.missing = dense.masked_fill_(self.mask | (variance <= 0), 0)
        benefit = (self.missing / torch.where(variance > 0, variance, 1) ** variance_power).float()
        self._grow = _Queue(-benefit, benefit > 0, cycles), _Queue(benefit, benefit < 0, cycles)
        self._score = pruned.float().abs() * stats.norm
        if grouped:
            self._score.masked_fill_(~self.mask, torch.inf)
        else:
            self._prune = (
                _Queue(self._score, self.present < 0, cycles),
                _Queue(self._score, self.present > 0, cycles),
            )

    def grow(self, error: Tensor) -> tuple[Tensor, Tensor]:
        """The column to grow, int64 `[rows, 1]`, and whether there is one."""
        return _take(*self._grow, error > 0)

    def prune(self, error: Tensor) -> tuple[Tensor, Tensor]:
        """The column to prune, anywhere in the row, and whether there is one."""
        return _take(*self._prune, error >= 0)

    def prune_in_group(self, grow: Tensor, m: int) -> tuple[Tensor, Tensor]:
        """The column to prune in the group of `grow`, and whether there is one."""
        group = grow // m * m + torch.arange(m, device=grow.device)
        score, position = self._score.gather(1, group).min(1, keepdim=True)
        return group.gather(1, position), score < torch.inf

    def remove(self, column: Tensor, swap: Tensor) -> None:
        """Where `swap`, never prune `column` again (the queues do not come back by themselves)."""
        self._score.scatter_(1, column, torch.where(swap, torch.inf, self._score.gather(1, column)))


class _Queue:
    """Columns of every row in ascending order of a key, each read once."""

    def __init__(self, key: Tensor, allowed: Tensor, length: int) -> None:
        self.order = (
            torch.where(allowed, key, torch.inf).argsort(dim=1, stable=True)[:, :length].clone()
        )
        self.count = allowed.sum(1, keepdim=True)
        self.position = torch.zeros_like(self.count)


def _take(first: _Queue, second: _Queue, use_first: Tensor) -> tuple[Tensor, Tensor]:
    """The next column of one of two queues, row by row, and whether there was one."""
    column = torch.where(use_first, _peek(first), _peek(second))
    exists = torch.where(use_first, first.position < first.count, second.position < second.count)
    first.position += use_first
    second.position += ~use_first
    return column, exists


def _peek(queue: _Queue) -> Tensor:
    return queue.order.gather(1, queue.position.clamp_max(queue.order.shape[1] - 1))
