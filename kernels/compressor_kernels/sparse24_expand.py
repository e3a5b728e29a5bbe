import triton
import triton.language as tl

EXPAND = tl.constexpr("""{
.reg .b32 a, b, c;
shl.b32 a, $3, 3;
and.b32 a, a, 0x18;
shl.b32 b, $3, 1;
and.b32 b, b, 0x18;
shl.b32 a, 0x34, a;
shl.b32 b, 0x12, b;
add.u32 c, a, b;
sub.u32 c, 0x44444444, c;
shr.u32 b, c, 16;
prmt.b32 $0, $2, 0, c;
prmt.b32 $1, $2, 0, b;
}""")


@triton.jit
def _expand(pair, nibble, ASM: tl.constexpr):
    if ASM:
        low, high = tl.inline_asm_elementwise(EXPAND, "=r,=r,r,r", [pair, nibble], dtype=(tl.int32, tl.int32), is_pure=True, pack=1)
    else:
        i0 = nibble & 3
        i1 = nibble >> 2 & 3
        first = pair & 0xFFFF
        second = pair >> 16 & 0xFFFF
        zero = tl.zeros_like(pair)
        c0 = tl.where(i0 == 0, first, zero)
        c1 = tl.where(i0 == 1, first, tl.where(i1 == 1, second, zero))
        c2 = tl.where(i0 == 2, first, tl.where(i1 == 2, second, zero))
        c3 = tl.where(i1 == 3, second, zero)
        low = c0 | c1 << 16
        high = c2 | c3 << 16
    return low, high


@triton.jit
def _halves(words, dtype: tl.constexpr):
    return tl.join(words.to(tl.int16), (words >> 16).to(tl.int16)).reshape(words.shape[0], 2 * words.shape[1]).to(dtype, bitcast=True)


@triton.jit
def kernel(x_ptr, v_ptr, m_ptr, y_ptr, M, N, K, BM: tl.constexpr, BN: tl.constexpr, BW: tl.constexpr, ASM: tl.constexpr, MODE: tl.constexpr, MASK: tl.constexpr, META32: tl.constexpr):
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    pn = tl.program_id(0)
    n = pn * BN + tl.arange(0, BN)
    rn = tl.minimum(n, N - 1)
    m = tl.arange(0, BM)
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    G = K // 4
    BG: tl.constexpr = 4 * BW
    shift = 4 * tl.arange(0, 4)
    shift8 = 4 * tl.arange(0, 8)
    for k0 in range(0, K, 16 * BW):
        g = k0 // 4 + tl.arange(0, BG)
        w = k0 // 16 + tl.arange(0, BW)
        if MASK:
            pair = tl.load(v_ptr + rn[:, None] * G + g[None, :], mask=g[None, :] < G, other=0)
        else:
            pair = tl.load(v_ptr + rn[:, None] * G + g[None, :])
        if META32:
            w = k0 // 32 + tl.arange(0, BW // 2)
            word = tl.load(m_ptr + rn[:, None] * (K // 32) + w[None, :])
            nibble = (word[:, :, None] >> shift8[None, None, :]).reshape(BN, BG)
        else:
            word = tl.load(m_ptr + rn[:, None] * tl.cdiv(K, 16) + w[None, :]).to(tl.int32)
            nibble = (word[:, :, None] >> shift[None, None, :]).reshape(BN, BG)
        low, high = _expand(pair, nibble, ASM)
        if MODE == 0:
            k = k0 + tl.arange(0, 16 * BW)
            x = tl.load(x_ptr + m[None, :] * K + k[:, None], mask=(m < M)[None, :], other=0)
            wt = _halves(tl.join(low, high).reshape(BN, 2 * BG), dtype)
            acc = tl.dot(wt, x, acc)
        else:
            r = tl.arange(0, 2 * BG)
            k = k0 + r // 2 * 4 + r % 2
            xl = tl.load(x_ptr + m[None, :] * K + k[:, None], mask=(m < M)[None, :], other=0)
            xh = tl.load(x_ptr + m[None, :] * K + k[:, None] + 2, mask=(m < M)[None, :], other=0)
            acc = tl.dot(_halves(low, dtype), xl, acc)
            acc = tl.dot(_halves(high, dtype), xh, acc)
    tl.store(y_ptr + m[None, :] * N + n[:, None], acc.to(dtype), mask=(m < M)[None, :] & (n < N)[:, None])
