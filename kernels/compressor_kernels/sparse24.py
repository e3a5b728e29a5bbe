"""y = x Wᵀ + bias for a packed 2:4 weight: the checked functions, the torch ops behind them, and
the launches.

Up to 96 rows of x the kernels read the packed weight, 0.5625 of the dense bytes: `mma` or `gemv` in
fragment order, `dot` in the stored layout. With more rows the dense weight is written once and
cuBLAS multiplies. Where no kernel runs the twin in reference.py computes, and it also defines the
gradient of x.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from compressor_kernels import backend, reference
from compressor_kernels.backend import launch, power_of_two, words
from compressor_kernels.fragments import Fragments, from_fragments
from compressor_kernels.kernel_config import choose
from compressor_kernels.library import define
from compressor_kernels.packing import check_shapes


def sparse24(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    bias: Tensor | None = None,
    semaphore: Tensor | None = None,
) -> Tensor:
    """y = x Wᵀ + bias for a weight in the stored layout.

    Args:
        x: `[..., in]`.
        values: `[out, in / 2]`, the dtype of x.
        metadata: int16 `[out, ceil(in / 16)]`; every group names two ascending columns
            (`packing.check24`).
        bias: `[out]` or None.
        semaphore: int32 zeros of the weight's own, see `new_semaphore`; without it K is not split
            over programs.

    Returns:
        `[..., out]` in the dtype of x.

    Raises:
        ValueError: shapes, dtypes, devices or strides do not fit.
    """
    check_shapes(values, metadata)
    check_call(
        x,
        2 * values.shape[1],
        len(values),
        values.dtype,
        {"values": values, "metadata": metadata},
        bias,
    )
    if differentiable(x, bias):
        return reference.sparse24(x, values, metadata, bias)
    return stored_op(x, values, metadata, bias, semaphore)


def sparse24_fragments(
    x: Tensor,
    fragments: Fragments,
    out_features: int,
    bias: Tensor | None = None,
    semaphore: Tensor | None = None,
) -> Tensor:
    """y = x Wᵀ + bias for a weight `[out_features, in]` in fragment order; otherwise as
    `sparse24`.
    """
    check_fragments(x, fragments, out_features)
    check_call(x, x.shape[-1], out_features, fragments.values.dtype, {}, bias)
    if differentiable(x, bias):
        return reference.sparse24(x, *from_fragments(fragments, out_features, x.shape[-1]), bias)
    return fragments_op(x, *fragments, out_features, bias, semaphore)


def check_input(x: Tensor, in_features: int, weight: Tensor) -> None:
    """Raise ValueError unless x is `[..., in_features]`, of the dtype and on the device of the
    weight.
    """
    if x.dim() == 0 or x.shape[-1] != in_features or x.dtype != weight.dtype:
        raise ValueError(
            f"x is {x.dtype} {tuple(x.shape)}, not {weight.dtype} [..., {in_features}]"
        )
    if x.device != weight.device:
        raise ValueError(f"the weight is on {weight.device}, x on {x.device}")


def differentiable(*tensors: Tensor | None) -> bool:
    """A gradient will be asked of one of them: the twin computes, the ops have none."""
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def check_fragments(x: Tensor, fragments: Fragments, out_features: int) -> None:
    """Raise ValueError unless the fragments are those of a weight `[out_features, in]`, contiguous
    on the device of x.
    """
    tiles, ktiles = fragments.words.shape[:2]
    if fragments.values.shape != (tiles, ktiles, 2, 32, 8) or tiles != -(-out_features // 16):
        raise ValueError(
            f"fragments {tuple(fragments.values.shape)} are not those of {out_features} outputs"
        )
    if ktiles != -(-x.shape[-1] // 64) or x.shape[-1] % 4:
        raise ValueError(
            f"x has {x.shape[-1]} features; the fragments hold {64 * ktiles - 60} to "
            f"{64 * ktiles}, a multiple of 4"
        )
    _check_placed(x, {"values": fragments.values, "words": fragments.words})


def check_call(
    x: Tensor,
    in_features: int,
    out_features: int,
    dtype: torch.dtype,
    weights: dict[str, Tensor],
    bias: Tensor | None,
) -> None:
    """Raise ValueError unless x and bias fit a weight of that shape and dtype, all of it contiguous
    on the device of x.
    """
    if x.dim() == 0 or x.shape[-1] != in_features or x.dtype != dtype:
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}, not {dtype} [..., {in_features}]")
    if bias is not None and (bias.shape != (out_features,) or bias.dtype != dtype):
        raise ValueError(f"bias is {bias.dtype} {tuple(bias.shape)}, not {dtype} [{out_features}]")
    _check_placed(x, {**weights, **({} if bias is None else {"bias": bias})})


def _check_placed(x: Tensor, weights: dict[str, Tensor]) -> None:
    for name, tensor in weights.items():
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}, x on {x.device}")
        if not tensor.is_contiguous():
            raise ValueError(f"{name} is not contiguous")


def new_semaphore(out_features: int, device: torch.device | str) -> Tensor:
    """Zeros that the programs of one weight count in; they are zero again after every call.

    A weight needs its own, and must not be in two streams at once.
    """
    return torch.zeros(2 * -(-out_features // 16), dtype=torch.int32, device=device)


def _stored(
    x: Tensor, values: Tensor, metadata: Tensor, bias: Tensor | None, semaphore: Tensor | None
) -> Tensor:
    values, metadata = values.contiguous(), metadata.view(torch.int16).contiguous()
    if not x.numel() or not backend.runs(x):
        return reference.sparse24(x, values, metadata, bias)
    config = choose("stored", x.device, len(values), x.shape[-1], x.numel() // x.shape[-1])
    return run_stored(x, values, metadata, bias, semaphore, config)


def _fake_stored(
    x: Tensor, values: Tensor, metadata: Tensor, bias: Tensor | None, semaphore: Tensor | None
) -> Tensor:
    return x.new_empty(*x.shape[:-1], values.shape[0])


def _fragments(
    x: Tensor,
    values: Tensor,
    words: Tensor,
    out_features: int,
    bias: Tensor | None,
    semaphore: Tensor | None,
) -> Tensor:
    fragments = Fragments(values, words)
    if not x.numel() or not backend.runs(x):
        return reference.sparse24(x, *from_fragments(fragments, out_features, x.shape[-1]), bias)
    config = choose("fragments", x.device, out_features, x.shape[-1], x.numel() // x.shape[-1])
    return run_fragments(x, fragments, out_features, bias, semaphore, config)


def _fake_fragments(
    x: Tensor,
    values: Tensor,
    words: Tensor,
    out_features: int,
    bias: Tensor | None,
    semaphore: Tensor | None,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], out_features)


stored_op = define(
    "sparse24_stored(Tensor x, Tensor values, Tensor metadata, Tensor? bias, Tensor(a!)? semaphore)"
    " -> Tensor",
    _stored,
    _fake_stored,
)
fragments_op = define(
    "sparse24_fragments(Tensor x, Tensor values, Tensor words, SymInt out_features, Tensor? bias,"
    " Tensor(a!)? semaphore) -> Tensor",
    _fragments,
    _fake_fragments,
)


def run_stored(
    x: Tensor,
    values: Tensor,
    metadata: Tensor,
    bias: Tensor | None,
    semaphore: Tensor | None,
    config: dict[str, Any],
) -> Tensor:
    """One call with a kernel and settings of one's own choosing, unchecked: for benchmarks and
    tests.
    """
    from compressor_kernels import decompress

    (n, k), m = (len(values), x.shape[-1]), x.numel() // x.shape[-1]
    if config["kernel"] == "dense":
        return linear(x, unpack_stored(values, metadata), bias)
    x, y = x.contiguous(), x.new_empty(*x.shape[:-1], n)
    bm, bn = config["bm"], config["bn"]
    programs = (-(-n // bn), -(-m // bm))
    parts, partial = workspace(x, semaphore, config["split"], programs[0] * programs[1], bn * bm)
    launch(decompress.product, (programs[0], parts, programs[1]),
        x, words(values), metadata, bias, partial, semaphore, y, m, n, k, BM=bm, BN=bn,
        BK=config["bk"], PARTS=parts,
        BIAS=bias is not None, ASM=backend.nvidia(), WIDE=backend.interpreting(),
        num_warps=config["warps"],
        num_stages=config["stages"], counter=semaphore,
    )  # fmt: skip
    return y


def run_fragments(
    x: Tensor,
    fragments: Fragments,
    out_features: int,
    bias: Tensor | None,
    semaphore: Tensor | None,
    config: dict[str, Any],
) -> Tensor:
    """One call with a kernel and settings of one's own choosing, unchecked: for benchmarks and
    tests.
    """
    from compressor_kernels import gemv, mma

    n, k, m = out_features, x.shape[-1], x.numel() // x.shape[-1]
    nt, kt = fragments.words.shape[:2]
    if config["kernel"] == "dense":
        return linear(x, unpack_fragments(fragments, n, k), bias)
    x, y = x.contiguous(), x.new_empty(*x.shape[:-1], n)
    warps, bf16, values = config["warps"], x.dtype == torch.bfloat16, words(fragments.values)
    if config["kernel"] == "gemv":
        parts, partial = workspace(x, semaphore, config["split"], nt, 16)
        launch(gemv.product, (nt, parts),
            words(x), values, fragments.words, bias, partial, semaphore, y, n, k, kt,
            WARPS=warps, PARTS=parts, BF16=bf16, BIAS=bias is not None, num_warps=warps,
            counter=semaphore,
        )  # fmt: skip
    else:
        stack, rows, tiles, pdl = (
            config["stack"],
            config["row_tiles"],
            -(-m // 8),
            config.get("pdl", False),
        )
        programs, lanes = -(-nt // (stack * rows)), 32 * stack * rows * tiles
        parts, partial = workspace(x, semaphore, config["split"], programs, 4 * lanes)
        x = ordered(x.view(m, k), tiles, pdl) if config["ordered"] else words(x)
        launch(mma.product, (programs, parts),
            x, values, fragments.words, bias, partial, semaphore, y, m, n, k, kt, nt, WARPS=warps,
            STACK=stack, ROWS=rows,
            TILES=tiles, UNROLL=config["unroll"], PARTS=parts, ORDERED=config["ordered"],
            EVEN=k % 64 == 0, BF16=bf16,
            BIAS=bias is not None, PDL=pdl, SIZE=power_of_two(lanes), num_warps=warps, pdl=pdl,
            counter=semaphore,
        )  # fmt: skip
    return y


def ordered(x: Tensor, tiles: int, pdl: bool = False) -> Tensor:
    """x `[rows, in]` in fragment order, int32 `[ktiles, tiles, 2, 32, 4]`, filled up with zeros;
    `pdl`: the next launch waits.
    """
    from compressor_kernels import mma

    m, k = x.shape
    result = torch.empty(-(-k // 64), tiles, 2, 32, 4, dtype=torch.int32, device=x.device)
    launch(mma.order, result.shape[:2], words(x), result, m, k, TILES=tiles, PDL=pdl, num_warps=2)
    return result


def workspace(
    x: Tensor, semaphore: Tensor | None, split: int, programs: int, size: int
) -> tuple[int, Tensor]:
    """In how many parts K is split, and room for their sums: in one where `semaphore` does not hold
    all programs.
    """
    if semaphore is None or programs > len(semaphore):
        split = 1
    return split, torch.empty(
        split * programs * size if split > 1 else 1, dtype=torch.float32, device=x.device
    )


def unpack_stored(values: Tensor, metadata: Tensor) -> Tensor:
    """The dense weight `[out, in]`, as `packing.unpack24`, by one kernel."""
    from compressor_kernels import decompress

    n, k = len(values), 2 * values.shape[1]
    dense = values.new_empty(n, k)
    launch(
        decompress.unpack_stored,
        (-(-n // 16), -(-k // 256)),
        words(values),
        metadata,
        words(dense),
        n,
        k,
        BN=16,
        BK=256,
        ASM=backend.nvidia(),
    )
    return dense


def unpack_fragments(fragments: Fragments, out_features: int, in_features: int) -> Tensor:
    """The dense weight `[out, in]` of one in fragment order, by one kernel."""
    from compressor_kernels import decompress

    dense = fragments.values.new_empty(out_features, in_features)
    grid = fragments.words.shape[:2]
    launch(decompress.unpack_fragments, grid,
        words(fragments.values), fragments.words, words(dense), out_features, in_features, grid[1],
        ASM=backend.nvidia(), num_warps=2,
    )  # fmt: skip
    return dense
