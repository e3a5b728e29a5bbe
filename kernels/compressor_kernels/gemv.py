"""One row of x times a weight in fragment order, without tensor cores: bytes of x are permuted to
meet the values.

The pair of values of a group needs x at its columns i0 and i1. The group's four x are eight bytes,
and one PRMT picks the four wanted; two fused multiply-adds in float32 follow. It does not depend on
how `mma.sp` spreads a fragment over lanes.
"""

import triton
import triton.language as tl

from compressor_kernels.split import finish

# i0 | i1 << 8, times 0x22, plus 0x1010, selects the bytes 2 i0, 2 i0 + 1, 2 i1, 2 i1 + 1.
GATHER = tl.constexpr("""{
.reg .b32 a, b;
and.b32 a, $1, 3;
shl.b32 b, $1, 6;
and.b32 b, b, 0x300;
or.b32 a, a, b;
mad.lo.u32 a, a, 0x22, 0x1010;
prmt.b32 $0, $2, $3, a;
}""")


@triton.jit
def _float(words, BF16: tl.constexpr):
    """int32 of two 16-bit floats -> two float32."""
    if BF16:
        low = (words << 16).to(tl.float32, bitcast=True)
        high = (words & -65536).to(tl.float32, bitcast=True)
    else:
        low = words.to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
        high = (words >> 16).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def product(
    x_ptr, v_ptr, m_ptr, bias_ptr, part_ptr, sem_ptr, y_ptr, N, K, KT,
    WARPS: tl.constexpr, PARTS: tl.constexpr, BF16: tl.constexpr, BIAS: tl.constexpr,
):  # fmt: skip
    """y = W x + bias. x int32 [K / 2], v int32 [NT, KT, 2, 32, 4], m int32 [NT, KT, 32], y [N];
    grid (NT, PARTS of K).

    A program is a row tile; its warps share out the columns.
    """
    t = tl.arange(0, 32 * WARPS)[:, None]
    c = tl.arange(0, 4)[None, :]
    gid, tig = t % 32 // 4, t % 4
    own = tl.cdiv(KT, PARTS)
    start = tl.program_id(1) * own
    end = tl.minimum(start + own, KT)
    shift = 4 * tig + 16 * (c % 2)
    acc = tl.zeros((32 * WARPS, 4), tl.float32)
    for first in range(start, end, WARPS):
        kt = first + t // 32
        tile = tl.program_id(0) * KT + kt
        for step in tl.static_range(2):
            place = v_ptr + tile * 256 + step * 128 + t % 32 * 4 + c
            pair = tl.load(place, mask=kt < end, other=0, eviction_policy="evict_first")
            word = (
                tl.load(
                    m_ptr + tile * 32 + gid * 4 + 2 * step + c // 2, mask=kt < end, other=0x44444444
                )
                >> shift
            )
            g = kt * 16 + step * 8 + c // 2 * 4 + tig
            low = tl.load(x_ptr + 2 * g, mask=(g < K // 4) & (kt < end), other=0)
            high = tl.load(x_ptr + 2 * g + 1, mask=(g < K // 4) & (kt < end), other=0)
            met = tl.inline_asm_elementwise(
                GATHER, "=r,r,r,r", [word, low, high], dtype=tl.int32, is_pure=True, pack=1
            )
            v0, v1 = _float(pair, BF16)
            x0, x1 = _float(met, BF16)
            acc = acc + v0 * x0 + v1 * x1
    # rows gid and gid + 8 of the tile: the sum over warps, over tig and over the two halves of the
    # groups
    rows = tl.sum(tl.sum(tl.sum(acc.reshape(WARPS, 8, 4, 2, 2), axis=3), axis=2), axis=0)
    n = tl.program_id(0) * 16 + tl.arange(0, 8)[:, None] + 8 * tl.arange(0, 2)[None, :]
    finish(
        rows,
        n,
        n,
        n < N,
        tl.program_id(0),
        tl.num_programs(0),
        part_ptr,
        sem_ptr,
        bias_ptr,
        y_ptr,
        PARTS,
        BIAS,
    )
