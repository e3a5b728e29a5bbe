"""y[pivots] = V x, y[rest] = C (V x), with a bias: a weight whose rows are r of its own, V, and
combinations of them. What is told of pivots, the checked function, and the op.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor_kernels import reference
from compressor_kernels.library import define
from compressor_kernels.sparse24 import check_call, differentiable


def check_pivots(pivots: Tensor, out_features: int) -> None:
    """Raise ValueError unless `pivots` `[r]` ascend strictly, from 0 to below `out_features`."""
    wide = pivots.long()
    if len(wide) and (int(wide[0]) < 0 or int(wide[-1]) >= out_features):
        raise ValueError(f"pivots from {int(wide[0])} to {int(wide[-1])} of {out_features} rows")
    if not bool((wide.diff() > 0).all()):
        place = int((wide.diff() <= 0).nonzero()[0]) + 1
        raise ValueError(f"pivot {place} is {int(wide[place])}, after {int(wide[place - 1])}")


def row_order(pivots: Tensor, out_features: int) -> Tensor:
    """Which rows of the weight are those of V and then those of C V, int64 `[out]`: the pivots, and
    the others, both ascending. A permutation, whatever rows `pivots` names.
    """
    others = torch.ones(out_features, dtype=torch.bool, device=pivots.device)
    return others.index_fill(0, pivots.long(), False).argsort(stable=True)


def pivot(
    x: Tensor,
    v: Tensor,
    c: Tensor,
    rows: Tensor,
    bias: Tensor | None = None,
    semaphore: Tensor | None = None,
) -> Tensor:
    """y[rows[:r]] = V x, y[rows[r:]] = C (V x), and the bias added.

    Args:
        x: `[..., in]`.
        v: `[r, in]`, the dtype of x.
        c: `[out - r, r]`, the dtype of x.
        rows: int64 `[out]`, as `row_order` gives them.
        bias: `[out]` or None.
        semaphore: int32 zeros of the weight's own (`sparse24.new_semaphore(out)`); without it K is
            not split.

    Returns:
        `[..., out]` in the dtype of x.

    Raises:
        ValueError: shapes, dtypes, devices or strides do not fit.
    """
    if v.dim() != 2 or c.dim() != 2 or c.shape[1] != v.shape[0] or c.dtype != v.dtype:
        raise ValueError(
            f"v {v.dtype} {tuple(v.shape)} and c {c.dtype} {tuple(c.shape)} are not of one weight"
        )
    out_features = len(v) + len(c)
    if rows.shape != (out_features,) or rows.dtype != torch.int64:
        raise ValueError(f"rows is {rows.dtype} {tuple(rows.shape)}, not int64 [{out_features}]")
    check_call(x, v.shape[1], out_features, v.dtype, {"v": v, "c": c, "rows": rows}, bias)
    if differentiable(x, v, c, bias):
        return reference.pivot(x, v, c, rows, bias)
    return pivot_op(x, v, c, rows, bias, semaphore)


def _pivot(
    x: Tensor,
    v: Tensor,
    c: Tensor,
    rows: Tensor,
    bias: Tensor | None,
    semaphore: Tensor | None,
) -> Tensor:
    return reference.pivot(x, v, c, rows, bias)


def _fake(
    x: Tensor,
    v: Tensor,
    c: Tensor,
    rows: Tensor,
    bias: Tensor | None,
    semaphore: Tensor | None,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], rows.shape[0])


pivot_op = define(
    "pivot(Tensor x, Tensor v, Tensor c, Tensor rows, Tensor? bias, Tensor(a!)? semaphore)"
    " -> Tensor",
    _pivot,
    _fake,
)
