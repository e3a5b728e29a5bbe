"""The 2:4 weight as it is stored, expanded in registers: a product with `tl.dot` on any GPU, and
the dense weight.

A group of four weights is one 32-bit pair of values and a nibble i0 | i1 << 2. It becomes two
32-bit words, columns 0 and 1 and columns 2 and 3, and these two halves of a row meet the same
halves of x in two `tl.dot`. On NVIDIA the expansion is two byte permutations (PRMT); elsewhere, and
in the interpreter, the same in plain arithmetic.
"""

import triton
import triton.language as tl

from compressor_kernels.split import dot, finish, synchronous

# Selectors of PRMT pick bytes 0..3 of the pair or, with 4, a zero: four zeros a word, and the bytes
# 0x10 and 0x32 of the first and second value at the bytes 2 i0 and 2 i1 of the eight.
DECOMPRESS = tl.constexpr("""{
.reg .b32 a, b;
shl.b32 a, $3, 3;
and.b32 a, a, 0x18;
shl.b32 b, $3, 1;
and.b32 b, b, 0x18;
shl.b32 a, 0x34, a;
shl.b32 b, 0x12, b;
add.u32 a, a, b;
sub.u32 a, 0x44444444, a;
shr.u32 b, a, 16;
prmt.b32 $0, $2, 0, a;
prmt.b32 $1, $2, 0, b;
}""")


@triton.jit
def decompress(pair, nibble, ASM: tl.constexpr):
    """int32 pairs and nibbles (the bits above them are ignored) -> columns 0, 1 and columns 2, 3 of
    the groups, int32 each.
    """
    if ASM:
        low, high = tl.inline_asm_elementwise(
            DECOMPRESS,
            "=r,=r,r,r",
            [pair, nibble],
            dtype=(tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
    else:
        i0 = nibble & 3
        i1 = nibble >> 2 & 3
        first = pair & 0xFFFF
        second = pair >> 16 & 0xFFFF
        zero = tl.zeros_like(pair)
        column1 = tl.where(i0 == 1, first, tl.where(i1 == 1, second, zero))
        column2 = tl.where(i0 == 2, first, tl.where(i1 == 2, second, zero))
        low = tl.where(i0 == 0, first, zero) | column1 << 16
        high = column2 | tl.where(i1 == 3, second, zero) << 16
    return low, high


@triton.jit
def _halves(words, dtype: tl.constexpr):
    """int32 [R, C] -> dtype [R, 2 C], the low half first."""
    halves = tl.join(words.to(tl.int16), (words >> 16).to(tl.int16))
    return halves.reshape(words.shape[0], 2 * words.shape[1]).to(dtype, bitcast=True)


@triton.jit
def _groups(v_ptr, m_ptr, row, g, w, K, ASM: tl.constexpr):
    """The groups g [G] of rows row [R], expanded; w [G / 4] are their words of metadata."""
    pair = tl.load(v_ptr + row[:, None] * (K // 4) + g[None, :], mask=g[None, :] < K // 4, other=0)
    words = tl.cdiv(K, 16)
    word = tl.load(
        m_ptr + row[:, None] * words + w[None, :], mask=w[None, :] < words, other=0x4444
    ).to(tl.int32)
    nibble = (word[:, :, None] >> 4 * tl.arange(0, 4)[None, None, :]).reshape(
        pair.shape[0], pair.shape[1]
    )
    return decompress(pair, nibble, ASM)


@triton.jit
def product(
    x_ptr, v_ptr, m_ptr, bias_ptr, part_ptr, sem_ptr, y_ptr, M, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr, BIAS: tl.constexpr,
    ASM: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """y = x Wᵀ + bias. x [M, K], v int32 [N, K / 4], m int16 [N, ceil(K / 16)], y [M, N]; WIDE as
    in split.dot.

    Grid (N / BN, PARTS of K, M / BM), rounded up.
    """
    synchronous(BN)
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    m = tl.program_id(2) * BM + tl.arange(0, BM)
    row = tl.minimum(n, N - 1)
    own = tl.cdiv(tl.cdiv(K, BK), PARTS) * BK
    start = tl.program_id(1) * own
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    half = tl.arange(0, BK // 2)
    for k0 in range(start, tl.minimum(start + own, K), BK):
        g = k0 // 4 + tl.arange(0, BK // 4)
        low, high = _groups(v_ptr, m_ptr, row, g, k0 // 16 + tl.arange(0, BK // 16), K, ASM)
        k = k0 + half // 2 * 4 + half % 2
        mask = (m < M)[None, :] & (k < K)[:, None]
        x_low = tl.load(x_ptr + m[None, :] * K + k[:, None], mask=mask, other=0)
        x_high = tl.load(x_ptr + m[None, :] * K + k[:, None] + 2, mask=mask, other=0)
        w_low = _halves(low, dtype)
        w_high = _halves(high, dtype)
        acc = dot(w_low, x_low, acc, WIDE)
        acc = dot(w_high, x_high, acc, WIDE)
    index = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    count = tl.num_programs(0) * tl.num_programs(2)
    place = m[None, :] * N + n[:, None]
    mask = (m < M)[None, :] & (n < N)[:, None]
    finish(
        acc, place, n[:, None], mask, index, count, part_ptr, sem_ptr, bias_ptr, y_ptr, PARTS, BIAS
    )


@triton.jit
def unpack_stored(v_ptr, m_ptr, w_ptr, N, K, BN: tl.constexpr, BK: tl.constexpr, ASM: tl.constexpr):
    """The dense weight, int32 [N, K / 2], of a stored one. Grid (N / BN, K / BK), rounded up."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)
    k0 = tl.program_id(1) * BK
    g = k0 // 4 + tl.arange(0, BK // 4)
    low, high = _groups(
        v_ptr, m_ptr, tl.minimum(n, N - 1), g, k0 // 16 + tl.arange(0, BK // 16), K, ASM
    )
    words = tl.join(low, high).reshape(BN, BK // 2)
    column = k0 // 2 + tl.arange(0, BK // 2)
    place = n.to(tl.int64)[:, None] * (K // 2) + column[None, :]
    tl.store(w_ptr + place, words, mask=(n < N)[:, None] & (column < K // 2)[None, :])


@triton.jit
def unpack_fragments(v_ptr, m_ptr, w_ptr, N, K, KT, ASM: tl.constexpr):
    """The dense weight, int32 [N, K / 2], of one in fragment order. Grid (row tiles, KT)."""
    tile = tl.program_id(0) * KT + tl.program_id(1)
    t = tl.arange(0, 64)[:, None]  # step and lane
    c = tl.arange(0, 4)[None, :]
    step, gid, tig = t // 32, t % 32 // 4, t % 4
    pair = tl.load(v_ptr + tile * 256 + t * 4 + c)
    word = tl.load(m_ptr + tile * 32 + gid * 4 + 2 * step + c // 2)
    low, high = decompress(pair, word >> 4 * tig + 16 * (c % 2), ASM)
    n = tl.program_id(0) * 16 + gid + 8 * (c % 2)
    g = tl.program_id(1) * 16 + 8 * step + 4 * (c // 2) + tig
    place = (n.to(tl.int64) * (K // 2) + 2 * g)[:, :, None] + tl.arange(0, 2)[None, None, :]
    tl.store(w_ptr + place, tl.join(low, high), mask=((n < N) & (g < K // 4))[:, :, None])
