"""y[pivots] = V x, y[rest] = C (V x), with a bias: a weight whose rows are r of its own, V, and
combinations of them. What is told of pivots, the checked function, and the op.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compressor_kernels import backend, reference
from compressor_kernels.backend import launch
from compressor_kernels.kernel_config import choose
from compressor_kernels.library import define
from compressor_kernels.lowrank import run_skinny
from compressor_kernels.sparse24 import check_call, differentiable, workspace


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


def dense(v: Tensor, c: Tensor, rows: Tensor) -> Tensor:
    """The weight `[out, in]` of V and C, its rows in the order that `row_order` gives."""
    stacked = torch.cat([v, c @ v])  # meta, while accelerate keeps the factors elsewhere
    return torch.empty_like(stacked).index_copy(0, rows.to(stacked.device), stacked)


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
    if not x.numel() or not len(v) or not len(c) or not backend.runs(x):
        return reference.pivot(x, v, c, rows, bias)
    v, c = v.contiguous(), c.contiguous()
    count, rank = x.numel() // x.shape[-1], len(v)
    first = choose("skinny", x.device, rank, x.shape[-1], count)
    second = choose("skinny", x.device, len(c), rank, count)
    if second["kernel"] == "dense":
        return reference.pivot(x, v, c, rows, bias)
    return scatter(run_skinny(x, v, None, semaphore, first), c, rows, bias, semaphore, second)


def scatter(
    inner: Tensor,
    c: Tensor,
    rows: Tensor,
    bias: Tensor | None,
    semaphore: Tensor | None,
    config: dict[str, Any],
) -> Tensor:
    """The second of the two launches, with settings of one's own choosing, unchecked: `inner`
    `[..., r]` is V x.
    """
    from compressor_kernels import skinny

    (n, k), m = c.shape, inner.numel() // inner.shape[-1]
    y, bm, bn = inner.new_empty(*inner.shape[:-1], n + k), config["bm"], config["bn"]
    programs = (-(-n // bn), -(-m // bm))
    count = programs[0] * programs[1]
    parts, partial = workspace(inner, semaphore, config["split"], count, bn * bm)
    launch(skinny.scattered, (programs[0], parts, programs[1]),
        inner.contiguous(), c, rows, bias, partial, semaphore, y, m, n, k, BM=bm, BN=bn,
        BK=config["bk"], PARTS=parts,
        BIAS=bias is not None, WIDE=backend.interpreting(), num_warps=config["warps"],
        num_stages=config["stages"], counter=semaphore,
    )  # fmt: skip
    return y


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
