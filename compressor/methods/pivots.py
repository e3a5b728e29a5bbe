"""The rows of a low-rank weight that all others are combinations of: QR with column pivoting of
its transposed left factor.

W = A V with A `[out, k]`. The row is taken that is farthest from the span of those taken before, in
the metric of A, then the next: so |C| in A[rest] = C A[pivots] stays small (between 1 and 1.5 on
real weights), and with it what rounding C and V adds. Column pivoting: Golub 1965, Numerische
Mathematik 7, 206-216. The form: Zhao et al. 2025, https://arxiv.org/abs/2501.19090.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.linalg import solve_triangular

from compressor.formats.pivot import Pivot

_NOTHING = 1e-11  # of the longest row: what is left of a row that depends on those taken
_STALE = 1e-12  # of a squared length: too little of it is left to be known, measure it anew


def by_pivots(left: Tensor, right: Tensor, dtype: torch.dtype) -> Pivot:
    """The weight A V as it is stored, computed in float64 and rounded once to `dtype`.

    Args:
        left: A, float64 `[out, k]`, k at most out. Where its rank is lower, the first of the rows
            that are left become pivots too, and nothing is made of them.
        right: V, float64 `[k, in]`.
        dtype: of the form.
    """
    count = left.shape[1]
    taken, basis = independent_rows(left)
    free = torch.ones(len(left), dtype=torch.bool, device=left.device)
    free[taken] = False
    spare = free.nonzero().flatten()[: count - len(taken)]
    free[spare] = False
    pivots, places = torch.cat([taken, spare]).sort()
    known = solve_triangular(left[taken] @ basis, left[free] @ basis, upper=False, left=False)
    c = torch.cat([known, known.new_zeros(len(known), len(spare))], dim=1)[:, places]
    v = left[pivots] @ right
    return Pivot(v.to(dtype), c.to(dtype).contiguous(), pivots.int())


def independent_rows(left: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of rows of `left`, float64 `[out, k]`, in the order in which they are taken, int64
    `[n]`, and an orthonormal basis of their span, `[k, n]`, in which they are lower triangular; n
    is the rank of `left`.
    """
    count = left.shape[1]
    basis = left.new_zeros(count, count)
    square = measured = left.square().sum(1)
    least = float(square.max()) * _NOTHING**2
    taken: list[int] = []
    while len(taken) < count:
        found = basis[:, : len(taken)]
        if float(square.max()) <= _STALE * float(measured.max()):
            square = measured = (left - left @ found @ found.T).square().sum(1)
        square = square.index_fill(0, torch.tensor(taken, device=left.device).long(), 0)
        row = int(square.argmax())
        if float(square[row]) <= least:
            break
        direction = left[row]
        for _ in range(2):  # once leaves rounding
            direction = direction - found @ (found.T @ direction)
        direction = direction / direction.norm()
        square = square - (left @ direction).square()
        basis[:, len(taken)] = direction
        taken.append(row)
    index = torch.tensor(taken, dtype=torch.int64, device=left.device)
    return index, basis[:, : len(taken)]
