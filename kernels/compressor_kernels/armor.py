"""y = A (S (B x)) + bias for a packed 2:4 core between block-diagonal wrappers: the checked
function, the op, the launches.

Up to 64 rows of x it is two launches (fused_armor.py), where S is in fragment order, its columns
are a multiple of 64 and both blocks are powers of two from 16 to 256. Everything else is the
product of sparse24.py between two of torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compressor_kernels import backend, reference
from compressor_kernels.backend import launch, power_of_two, words
from compressor_kernels.fragments import Fragments, from_fragments
from compressor_kernels.kernel_config import choose
from compressor_kernels.library import define
from compressor_kernels.sparse24 import (
    check_call,
    check_fragments,
    differentiable,
    sparse24,
    sparse24_fragments,
)

_SIZES = (16, 32, 64, 128, 256)


def armor(
    x: Tensor,
    core: tuple[Tensor, Tensor] | Fragments,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None = None,
    semaphore: Tensor | None = None,
) -> Tensor:
    """y = A (S (B x)) + bias.

    Args:
        x: `[..., in]`.
        core: S, `[out, in]`, as values and metadata or in fragment order; the dtype of x.
        a: `[out / bA, bA, bA]`, the dtype of x.
        b: `[in / bB, bB, bB]`, the dtype of x.
        bias: `[out]` or None.
        semaphore: int32 zeros of the weight's own (`sparse24.new_semaphore`), which the two
            launches need.

    Returns:
        `[..., out]` in the dtype of x.

    Raises:
        ValueError: shapes, dtypes, devices or strides do not fit.
    """
    for name, blocks in (("a", a), ("b", b)):
        if blocks.dim() != 3 or blocks.shape[1] != blocks.shape[2]:
            raise ValueError(f"{name} is {tuple(blocks.shape)}, not a stack of square blocks")
    out_features, in_features = a.shape[0] * a.shape[1], b.shape[0] * b.shape[1]
    check_call(x, in_features, out_features, a.dtype, {"a": a, "b": b}, bias)
    if not isinstance(core, Fragments) or differentiable(x, bias):
        inner = reference.block_diagonal(x, b)
        z = _core(inner, core, out_features, semaphore)
        y = reference.block_diagonal(z, a)
        return y if bias is None else y + bias
    check_fragments(x, core, out_features)
    return armor_op(x, *core, a, b, bias, semaphore)


def _core(
    x: Tensor, core: tuple[Tensor, Tensor] | Fragments, out_features: int, semaphore: Tensor | None
) -> Tensor:
    if isinstance(core, Fragments):
        return sparse24_fragments(x, core, out_features, None, semaphore)
    return sparse24(x, *core, None, semaphore)


def _armor(
    x: Tensor,
    values: Tensor,
    words: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    semaphore: Tensor | None,
) -> Tensor:
    core, n, k = Fragments(values, words), a.shape[0] * a.shape[1], x.shape[-1]
    if not x.numel() or not backend.runs(x):
        return reference.armor(x, *from_fragments(core, n, k), a, b, bias)
    a, b = a.contiguous(), b.contiguous()
    config = choose("armor", x.device, n, k, x.numel() // k)
    fits = k % 64 == 0 and a.shape[1] in _SIZES and b.shape[1] in _SIZES
    if config["kernel"] == "dense" or semaphore is None or not fits:
        y = reference.block_diagonal(_core(reference.block_diagonal(x, b), core, n, semaphore), a)
        return y if bias is None else y + bias
    return run_armor(x, core, a, b, bias, semaphore, config)


def _fake(
    x: Tensor,
    values: Tensor,
    words: Tensor,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    semaphore: Tensor | None,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], a.shape[0] * a.shape[1])


armor_op = define(
    "armor(Tensor x, Tensor values, Tensor words, Tensor a, Tensor b, Tensor? bias,"
    " Tensor(a!)? semaphore) -> Tensor",
    _armor,
    _fake,
)


def run_armor(
    x: Tensor,
    core: Fragments,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    semaphore: Tensor,
    config: dict[str, Any],
) -> Tensor:
    """One call with settings of one's own choosing, unchecked: for benchmarks and tests."""
    from compressor_kernels import fused_armor

    n, k, m = a.shape[0] * a.shape[1], x.shape[-1], x.numel() // x.shape[-1]
    nt, kt = core.words.shape[:2]
    stack, rows, parts = config["stack"], config["row_tiles"], config["split"]
    tiles, pdl = -(-m // 8), config.get("pdl", False)
    programs = -(-nt // (stack * rows))
    piece = 16 if not backend.hopper(x.device) else 128 if tiles <= 2 else 32
    common: dict[str, Any] = {
        "TILES": tiles, "BM": max(16, power_of_two(8 * tiles)), "WIDE": backend.interpreting(),
        "PDL": pdl,
    }  # fmt: skip
    inner = x.new_empty(kt, tiles, 2, 32, 8)
    sums = parts * programs * stack * rows * tiles * 128
    partial = x.new_empty(sums, dtype=torch.float32)
    y, size_a, size_b = x.new_empty(*x.shape[:-1], n), a.shape[1], b.shape[1]
    launch(fused_armor.apply_b, (k // size_b, -(-size_b // 32)),
        x.contiguous(), b, inner, m, k, SIZE=size_b, ROWS=min(size_b, 32), **common,
    )  # fmt: skip
    launch(fused_armor.product, (programs, parts),
        words(inner), words(core.values), core.words, a, bias, partial, semaphore, y, m, n, k, kt,
        nt, WARPS=config["warps"], STACK=stack, ROWS=rows, UNROLL=config["unroll"], PARTS=parts,
        SIZE=size_a, PIECE=min(size_a, piece),
        BF16=x.dtype == torch.bfloat16, BIAS=bias is not None, **common,
        num_warps=config["warps"], num_stages=1,  # more would hold all blocks of A in shared memory
        pdl=pdl, counter=semaphore,
    )  # fmt: skip
    return y
