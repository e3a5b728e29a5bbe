"""The sparse tensor cores from Triton: `mma.sp` on a weight in fragment order (fragments.py), as inline assembly.

`tl.inline_asm_elementwise` runs an instruction on the registers of a thread. With tensors [32 · warps, 4] of 32-bit elements
thread t of a program holds row t, four registers, and with pack=4 one instance of the assembly is the whole fragment of a
lane: a warp-wide instruction. That layout is the compiler's choice, so tests/test_compile.py checks it for each target.
One program is WARPS row tiles of 16 and one part of K; the output rows of x are the columns of the product (yᵀ = W xᵀ), in
TILES tiles of eight.
"""

import triton
import triton.language as tl

from compressor_kernels.split import arrive_last, store

_MMA = (
    "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{type}.{type}.f32 "
    "{{$0,$1,$2,$3}}, {{$4,$5,$6,$7}}, {{$8,$9,$10,$11}}, {{$16,$17,$18,$19}}, $12, 0x{step};"
)
BF16_0 = tl.constexpr(_MMA.format(type="bf16", step=0))
BF16_1 = tl.constexpr(_MMA.format(type="bf16", step=1))
FP16_0 = tl.constexpr(_MMA.format(type="f16", step=0))
FP16_1 = tl.constexpr(_MMA.format(type="f16", step=1))
REGISTERS = tl.constexpr("=f,=f,=f,=f,r,r,r,r,r,r,r,r,r,r,r,r,f,f,f,f")  # sum | weight | x | words | sum


@triton.jit
def _mma(acc, weight, x, word, STEP: tl.constexpr, BF16: tl.constexpr):
    if BF16:
        asm: tl.constexpr = BF16_1 if STEP else BF16_0
    else:
        asm: tl.constexpr = FP16_1 if STEP else FP16_0
    return tl.inline_asm_elementwise(asm, REGISTERS, [weight, x, word, acc], dtype=tl.float32, is_pure=False, pack=4)


@triton.jit
def _load_x(x_ptr, kt, j, lane, live, M, K, TILES: tl.constexpr, ORDERED: tl.constexpr, EVEN: tl.constexpr):
    """Both steps of x for tile j of its rows: fragment order (see `order`), or int32 [M, K / 2] as it is."""
    c = tl.arange(0, 4)[None, :]
    if ORDERED:
        place = x_ptr + ((kt * TILES + j) * 64 + lane[:, None]) * 4 + c
        x0 = tl.load(place, mask=live, other=0)
        x1 = tl.load(place + 128, mask=live, other=0)
    else:
        m = (lane // 4 + 8 * j)[:, None]
        k = kt * 32 + (lane % 4)[:, None] + 4 * c
        place = x_ptr + m * (K // 2) + k
        mask = (m < M) & live
        if EVEN:
            x0 = tl.load(place, mask=mask, other=0)
            x1 = tl.load(place + 16, mask=mask, other=0)
        else:
            x0 = tl.load(place, mask=mask & (k < K // 2), other=0)
            x1 = tl.load(place + 16, mask=mask & (k + 16 < K // 2), other=0)
    return x0, x1


@triton.jit
def accumulate(
    x_ptr, v_ptr, m_ptr, M, K, KT, NT,
    WARPS: tl.constexpr, TILES: tl.constexpr, UNROLL: tl.constexpr,
    ORDERED: tl.constexpr, EVEN: tl.constexpr, BF16: tl.constexpr,
):  # fmt: skip
    """This program's sums: a tuple of TILES fragments, float32 [32 · WARPS, 4]."""
    t = tl.arange(0, 32 * WARPS)
    c = tl.arange(0, 4)[None, :]
    lane = t % 32
    zeros = tl.zeros_like(lane)  # the interpreter takes no scalar for the mask of a tensor
    tile = tl.minimum(tl.program_id(0) * WARPS + t // 32, NT - 1) * KT
    own = tl.cdiv(KT, tl.num_programs(1))
    start = tl.program_id(1) * own
    end = tl.minimum(start + own, KT)
    sums = ()
    for _ in tl.static_range(TILES):
        sums = sums + (tl.zeros((32 * WARPS, 4), tl.float32),)  # noqa: RUF005
    for first in range(start, end, UNROLL):
        weights = ()
        for u in tl.static_range(UNROLL):  # all loads of the weights are under way before the first is used
            live = (zeros + first + u < end)[:, None]
            place = v_ptr + ((tile + first + u) * 64 + lane)[:, None] * 4 + c
            w0 = tl.load(place, mask=live, other=0, eviction_policy="evict_first")
            w1 = tl.load(place + 128, mask=live, other=0, eviction_policy="evict_first")
            word = tl.load(
                m_ptr + (tile + first + u) * 32 + lane,
                mask=zeros + first + u < end,
                other=0x44444444,
                eviction_policy="evict_first",
            )
            weights = weights + (w0, w1, word)  # noqa: RUF005
        for u in tl.static_range(UNROLL):
            word = tl.broadcast_to(weights[3 * u + 2][:, None], (32 * WARPS, 4))
            added = ()
            for j in tl.static_range(TILES):
                live = (zeros + first + u < end)[:, None]
                x0, x1 = _load_x(x_ptr, first + u, j, lane, live, M, K, TILES, ORDERED, EVEN)
                acc = _mma(sums[j], weights[3 * u], x0, word, 0, BF16)
                added = added + (_mma(acc, weights[3 * u + 1], x1, word, 1, BF16),)  # noqa: RUF005
            sums = added
    return sums


@triton.jit
def product(
    x_ptr, v_ptr, m_ptr, bias_ptr, part_ptr, sem_ptr, y_ptr, M, N, K, KT, NT,
    WARPS: tl.constexpr, TILES: tl.constexpr, SPLIT: tl.constexpr, UNROLL: tl.constexpr,
    ORDERED: tl.constexpr, EVEN: tl.constexpr, BF16: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """y = x Wᵀ + bias, M <= 8 TILES. v int32 [NT, KT, 2, 32, 4], m int32 [NT, KT, 32], y [M, N]; grid (NT / WARPS, parts).

    EVEN: K is a multiple of 64. SPLIT: K is in several parts. Partial sums: part [parts, programs, TILES, 32 · WARPS, 4].
    """
    sums = accumulate(x_ptr, v_ptr, m_ptr, M, K, KT, NT, WARPS, TILES, UNROLL, ORDERED, EVEN, BF16)
    t = tl.arange(0, 32 * WARPS)[:, None]
    c = tl.arange(0, 4)[None, :]
    n = (tl.program_id(0) * WARPS + t // 32) * 16 + t % 32 // 4 + 8 * (c // 2)
    m = t % 4 * 2 + c % 2
    if not SPLIT:
        for j in tl.static_range(TILES):
            store(sums[j], (m + 8 * j) * N + n, n, (m + 8 * j < M) & (n < N), bias_ptr, y_ptr, BIAS)
    else:
        parts = tl.num_programs(1)
        size: tl.constexpr = 128 * WARPS
        own = part_ptr + tl.program_id(0) * TILES * size + t * 4 + c
        stride = tl.num_programs(0) * TILES * size
        for j in tl.static_range(TILES):
            tl.store(own + tl.program_id(1) * stride + j * size, sums[j])
        if arrive_last(sem_ptr + tl.program_id(0), parts):
            for j in tl.static_range(TILES):
                total = tl.zeros((32 * WARPS, 4), tl.float32)
                for part in range(parts):
                    total += tl.load(own + part * stride + j * size, cache_modifier=".cg")
                store(total, (m + 8 * j) * N + n, n, (m + 8 * j < M) & (n < N), bias_ptr, y_ptr, BIAS)
            tl.store(sem_ptr + tl.program_id(0), 0)


@triton.jit
def order(x_ptr, o_ptr, M, K, TILES: tl.constexpr):
    """x int32 [M, K / 2] -> fragment order int32 [KT, TILES, 2, 32, 4], zeros where there is no x. Grid (KT, TILES)."""
    t = tl.arange(0, 64)[:, None]  # step and lane
    c = tl.arange(0, 4)[None, :]
    m = tl.program_id(1) * 8 + t % 32 // 4
    k = tl.program_id(0) * 32 + t // 32 * 16 + t % 4 + 4 * c
    x = tl.load(x_ptr + m * (K // 2) + k, mask=(m < M) & (k < K // 2), other=0)
    tl.store(o_ptr + (tl.program_id(0) * TILES + tl.program_id(1)) * 256 + t * 4 + c, x)
