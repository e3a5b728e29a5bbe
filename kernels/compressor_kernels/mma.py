"""The sparse tensor cores from Triton: `mma.sp` on a weight in fragment order (fragments.py), as
inline assembly.

`tl.inline_asm_elementwise` runs an instruction on the registers of a thread. With tensors [32 ·
warps, 4] of 32-bit elements thread t of a program holds row t, four registers, and with pack=4 one
instance of the assembly is the whole fragment of a lane: a warp-wide instruction. That layout is
the compiler's choice, so tests/test_compile.py checks it for each target. The rows of x are the
columns of the product (yᵀ = W xᵀ), in TILES tiles of eight.

How a program is arranged: STACK of its warps stand along the rows of W, each with ROWS row tiles of
16, which share what it loads of x; the WARPS / STACK groups of such warps share out the columns,
and their sums are added at the end. Few columns of x want one row tile and many warps along K: no
second program has to be waited for. Many want the opposite: x is read again for each program of
rows.
"""

import triton
import triton.language as tl

from compressor_kernels.split import arrive_last, issued, prefetch, store, total

_MMA = (
    "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.{type}.{type}.f32 "
    "{{$0,$1,$2,$3}}, {{$4,$5,$6,$7}}, {{$8,$9,$10,$11}}, {{$16,$17,$18,$19}}, $12, 0x{step};"
)
BF16_0 = tl.constexpr(_MMA.format(type="bf16", step=0))
BF16_1 = tl.constexpr(_MMA.format(type="bf16", step=1))
FP16_0 = tl.constexpr(_MMA.format(type="f16", step=0))
FP16_1 = tl.constexpr(_MMA.format(type="f16", step=1))
REGISTERS = tl.constexpr(
    "=f,=f,=f,=f,r,r,r,r,r,r,r,r,r,r,r,r,f,f,f,f"
)  # sum | weight | x | words | sum


@triton.jit
def _mma(acc, weight, x, word, STEP: tl.constexpr, BF16: tl.constexpr):
    if BF16:
        asm: tl.constexpr = BF16_1 if STEP else BF16_0
    else:
        asm: tl.constexpr = FP16_1 if STEP else FP16_0
    return tl.inline_asm_elementwise(
        asm, REGISTERS, [weight, x, word, acc], dtype=tl.float32, is_pure=False, pack=4
    )


@triton.jit
def _load_x(
    x_ptr, kt, j, lane, live, M, K, TILES: tl.constexpr, ORDERED: tl.constexpr, EVEN: tl.constexpr
):
    """Both steps of x for tile j of its rows: fragment order (see `order`), or int32 [M, K / 2] as
    it is.
    """
    c = tl.arange(0, 4)[None, :]
    if ORDERED:
        place = x_ptr + (((kt * TILES + j) * 64 + lane) * 4)[:, None] + c
        x0 = tl.load(place, mask=live[:, None], other=0)
        x1 = tl.load(place + 128, mask=live[:, None], other=0)
    else:
        m = (lane // 4 + 8 * j)[:, None]
        k = (kt * 32 + lane % 4)[:, None] + 4 * c
        place = x_ptr + m * (K // 2) + k
        mask = (m < M) & live[:, None]
        x0 = tl.load(place, mask=mask if EVEN else mask & (k < K // 2), other=0)
        x1 = tl.load(place + 16, mask=mask if EVEN else mask & (k + 16 < K // 2), other=0)
    return x0, x1


@triton.jit
def _load(
    v_ptr, m_ptr, kt, end, tile, lane, KT, NT, ROWS: tl.constexpr, UNROLL: tl.constexpr,
    STRIDE: tl.constexpr
):  # fmt: skip
    """The weights of tiles kt, kt + STRIDE, … (UNROLL of them) of each warp, for each of ROWS:
    values of both steps, metadata.
    """
    found = ()
    for u in tl.static_range(UNROLL):
        here = kt + u * STRIDE
        for r in tl.static_range(ROWS):
            place = tl.minimum(tile + r, NT - 1) * KT + here
            v = v_ptr + ((place * 64 + lane) * 4)[:, None] + tl.arange(0, 4)[None, :]
            w0 = tl.load(v, mask=(here < end)[:, None], other=0, eviction_policy="evict_first")
            w1 = tl.load(
                v + 128, mask=(here < end)[:, None], other=0, eviction_policy="evict_first"
            )
            word = tl.load(
                m_ptr + place * 32 + lane,
                mask=here < end,
                other=0x44444444,
                eviction_policy="evict_first",
            )
            found = found + (w0, w1, word)
    return found


@triton.jit
def _add(
    sums, loaded, x_ptr, kt, end, lane, M, K,
    ROWS: tl.constexpr, TILES: tl.constexpr, UNROLL: tl.constexpr, STRIDE: tl.constexpr,
    ORDERED: tl.constexpr, EVEN: tl.constexpr, BF16: tl.constexpr,
):  # fmt: skip
    """`sums` and the products of what `_load` gave with x."""
    for u in tl.static_range(UNROLL):
        here = kt + u * STRIDE
        added = ()
        for j in tl.static_range(TILES):
            x0, x1 = _load_x(x_ptr, here, j, lane, here < end, M, K, TILES, ORDERED, EVEN)
            for r in tl.static_range(ROWS):
                w0, w1, word = (
                    loaded[3 * (u * ROWS + r)],
                    loaded[3 * (u * ROWS + r) + 1],
                    loaded[3 * (u * ROWS + r) + 2],
                )
                words = tl.broadcast_to(word[:, None], (word.shape[0], 4))
                acc = _mma(sums[j * ROWS + r], w0, x0, words, 0, BF16)
                added = added + (_mma(acc, w1, x1, words, 1, BF16),)
        sums = added
    return sums


@triton.jit
def _over_warps(part, ALONG: tl.constexpr, LANES: tl.constexpr):
    """float32 [ALONG · LANES, 4] -> [LANES, 4], summed. Not `tl.sum`: for it Triton 3.6 puts 32
    lanes on one bank.
    """
    part = tl.permute(part.reshape(ALONG, LANES, 4), (1, 2, 0))
    for level in tl.static_range(4):
        if (ALONG >> level) > 1:
            even, odd = tl.split(part.reshape(LANES, 4, (ALONG >> level) // 2, 2))
            part = even + odd
    return part.reshape(LANES, 4)


@triton.jit
def accumulate(
    x_ptr, v_ptr, m_ptr, M, K, KT, NT,
    WARPS: tl.constexpr, STACK: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
    UNROLL: tl.constexpr,
    PARTS: tl.constexpr, ORDERED: tl.constexpr, EVEN: tl.constexpr, BF16: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """This program's sums: ROWS fragments, float32 [32 · STACK, 4], for each of TILES. PDL: x is
    not there before `gdc_wait`.
    """
    t = tl.arange(0, 32 * WARPS)
    lane = t % 32
    along: tl.constexpr = WARPS // STACK
    step: tl.constexpr = along * UNROLL
    tile = (tl.program_id(0) * STACK + t // 32 % STACK) * ROWS
    own = tl.cdiv(KT, PARTS)
    start = tl.program_id(1) * own
    end = tl.minimum(start + own, KT)
    kt = start + t // 32 // STACK
    if PDL:
        for u in tl.static_range(2 * UNROLL):
            for r in tl.static_range(ROWS):
                ahead = tl.minimum(tile + r, NT - 1) * KT + tl.minimum(kt + u * along, KT - 1)
                prefetch(v_ptr + ahead * 256 + lane * 8)
                prefetch(m_ptr + ahead * 32 + lane)
        tl.extra.cuda.gdc_wait()
    sums = ()
    for _ in tl.static_range(TILES * ROWS):
        sums = sums + (tl.zeros((32 * WARPS, 4), tl.float32),)
    # One batch is always under way while the tensor cores work on the other; two in turn, so that
    # neither is ever copied.
    one = _load(v_ptr, m_ptr, kt, end, tile, lane, KT, NT, ROWS, UNROLL, along)
    for _ in range(start, end, 2 * step):
        two = _load(v_ptr, m_ptr, kt + step, end, tile, lane, KT, NT, ROWS, UNROLL, along)
        issued(lane)
        sums = _add(
            sums, one, x_ptr, kt, end, lane, M, K, ROWS, TILES, UNROLL, along, ORDERED, EVEN, BF16
        )
        one = _load(v_ptr, m_ptr, kt + 2 * step, end, tile, lane, KT, NT, ROWS, UNROLL, along)
        issued(lane)
        sums = _add(
            sums,
            two,
            x_ptr,
            kt + step,
            end,
            lane,
            M,
            K,
            ROWS,
            TILES,
            UNROLL,
            along,
            ORDERED,
            EVEN,
            BF16,
        )
        kt += 2 * step
    if along > 1:
        added = ()
        for i in tl.static_range(TILES * ROWS):
            added = added + (_over_warps(sums[i], along, 32 * STACK),)
        sums = added
    return sums


@triton.jit
def keep(sums, part_ptr, STACK: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr):
    """Store this program's sums into part, float32 [parts, row tiles of all programs, TILES, 32,
    4].
    """
    t = tl.arange(0, 32 * STACK)[:, None]
    c = tl.arange(0, 4)[None, :]
    mine = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
    for r in tl.static_range(ROWS):
        tile = (mine * STACK + t // 32) * ROWS + r
        for j in tl.static_range(TILES):
            tl.store(part_ptr + (tile * TILES + j) * 128 + t % 32 * 4 + c, sums[j * ROWS + r])


@triton.jit
def product(
    x_ptr, v_ptr, m_ptr, bias_ptr, part_ptr, sem_ptr, y_ptr, M, N, K, KT, NT,
    WARPS: tl.constexpr, STACK: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
    UNROLL: tl.constexpr,
    PARTS: tl.constexpr, ORDERED: tl.constexpr, EVEN: tl.constexpr, BF16: tl.constexpr,
    BIAS: tl.constexpr, PDL: tl.constexpr,
    SIZE: tl.constexpr,
):  # fmt: skip
    """y = x Wᵀ + bias, M <= 8 TILES. v int32 [NT, KT, 2, 32, 4], m int32 [NT, KT, 32], y [M, N].

    Grid (NT / (STACK · ROWS), PARTS of K). SIZE: a power of two, at least the 32 · STACK · ROWS ·
    TILES lanes of the result.
    """
    sums = accumulate(
        x_ptr, v_ptr, m_ptr, M, K, KT, NT, WARPS, STACK, ROWS, TILES, UNROLL, PARTS, ORDERED, EVEN,
        BF16, PDL
    )  # fmt: skip
    c = tl.arange(0, 4)[None, :]
    if PARTS == 1:
        t = tl.arange(0, 32 * STACK)[:, None]
        for r in tl.static_range(ROWS):
            n = ((tl.program_id(0) * STACK + t // 32) * ROWS + r) * 16 + t % 32 // 4 + 8 * (c // 2)
            for j in tl.static_range(TILES):
                m = t % 4 * 2 + c % 2 + 8 * j
                store(sums[j * ROWS + r], m * N + n, n, (m < M) & (n < N), bias_ptr, y_ptr, BIAS)
    else:
        keep(sums, part_ptr, STACK, ROWS, TILES)
        if arrive_last(sem_ptr + tl.program_id(0), PARTS):
            mine: tl.constexpr = 32 * STACK * ROWS * TILES
            t = tl.arange(0, SIZE)[:, None]
            place = part_ptr + (tl.program_id(0) * mine + t) * 4 + c
            acc = total(place, tl.num_programs(0) * mine * 4, t < mine, PARTS)
            n = (
                (tl.program_id(0) * STACK * ROWS + t // (32 * TILES)) * 16
                + t % 32 // 4
                + 8 * (c // 2)
            )
            m = t // 32 % TILES * 8 + t % 4 * 2 + c % 2
            store(acc, m * N + n, n, (t < mine) & (m < M) & (n < N), bias_ptr, y_ptr, BIAS)
            tl.store(sem_ptr + tl.program_id(0), 0)


@triton.jit
def order(x_ptr, o_ptr, M, K, TILES: tl.constexpr, PDL: tl.constexpr):
    """x int32 [M, K / 2] -> fragment order int32 [KT, TILES, 2, 32, 4], zeros where there is no x.
    Grid (KT, TILES).

    PDL: let the next kernel be launched while this one runs.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    t = tl.arange(0, 64)[:, None]  # step and lane
    c = tl.arange(0, 4)[None, :]
    m = tl.program_id(1) * 8 + t % 32 // 4
    k = tl.program_id(0) * 32 + t // 32 * 16 + t % 4 + 4 * c
    x = tl.load(x_ptr + m * (K // 2) + k, mask=(m < M) & (k < K // 2), other=0)
    tl.store(o_ptr + (tl.program_id(0) * TILES + tl.program_id(1)) * 256 + t * 4 + c, x)
