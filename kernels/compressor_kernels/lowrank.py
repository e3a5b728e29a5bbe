"""y = U (V x) + bias: the checked function, the op, and its two launches of the product in
skinny.py.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.nn.functional import linear

from compressor_kernels import backend, reference
from compressor_kernels.backend import launch
from compressor_kernels.kernel_config import choose
from compressor_kernels.library import define
from compressor_kernels.sparse24 import check_call, differentiable, workspace


def lowrank(
    x: Tensor, u: Tensor, v: Tensor, bias: Tensor | None = None, semaphore: Tensor | None = None
) -> Tensor:
    """y = U (V x) + bias.

    Args:
        x: `[..., in]`.
        u: `[out, r]`, the dtype of x.
        v: `[r, in]`, the dtype of x.
        bias: `[out]` or None.
        semaphore: int32 zeros of the weight's own (`sparse24.new_semaphore(max(out, r))`); without
            it K is not split.

    Returns:
        `[..., out]` in the dtype of x.

    Raises:
        ValueError: shapes, dtypes, devices or strides do not fit.
    """
    if u.dim() != 2 or v.dim() != 2 or u.shape[1] != v.shape[0] or u.dtype != v.dtype:
        raise ValueError(
            f"u {u.dtype} {tuple(u.shape)} and v {v.dtype} {tuple(v.shape)} are not the factors of "
            f"one weight"
        )
    check_call(x, v.shape[1], u.shape[0], u.dtype, {"u": u, "v": v}, bias)
    if differentiable(x, u, v, bias):
        return reference.lowrank(x, u, v, bias)
    return lowrank_op(x, u, v, bias, semaphore)


def _lowrank(
    x: Tensor, u: Tensor, v: Tensor, bias: Tensor | None, semaphore: Tensor | None
) -> Tensor:
    if not x.numel() or not u.shape[1] or not backend.runs(x):
        return reference.lowrank(x, u, v, bias)
    u, v = u.contiguous(), v.contiguous()
    rows, rank = x.numel() // x.shape[-1], len(v)
    config = choose("skinny", x.device, rank, x.shape[-1], rows)
    inner = run_skinny(x, v, None, semaphore, config)
    return run_skinny(inner, u, bias, semaphore, choose("skinny", x.device, len(u), rank, rows))


def _fake(x: Tensor, u: Tensor, v: Tensor, bias: Tensor | None, semaphore: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], u.shape[0])


lowrank_op = define(
    "lowrank(Tensor x, Tensor u, Tensor v, Tensor? bias, Tensor(a!)? semaphore) -> Tensor",
    _lowrank,
    _fake,
)


def run_skinny(
    x: Tensor, w: Tensor, bias: Tensor | None, semaphore: Tensor | None, config: dict[str, Any]
) -> Tensor:
    """x Wᵀ + bias with a kernel and settings of one's own choosing, unchecked: for benchmarks and
    tests.
    """
    from compressor_kernels import skinny

    if config["kernel"] == "dense":
        return linear(x, w, bias)
    (n, k), m = w.shape, x.numel() // x.shape[-1]
    y, bm, bn = x.new_empty(*x.shape[:-1], n), config["bm"], config["bn"]
    programs = (-(-n // bn), -(-m // bm))
    parts, partial = workspace(x, semaphore, config["split"], programs[0] * programs[1], bn * bm)
    launch(skinny.product, (programs[0], parts, programs[1]),
        x.contiguous(), w, bias, partial, semaphore, y, m, n, k, BM=bm, BN=bn,
        BK=config["bk"], PARTS=parts,
        BIAS=bias is not None, WIDE=backend.interpreting(), num_warps=config["warps"],
        num_stages=config["stages"], counter=semaphore,
    )  # fmt: skip
    return y
