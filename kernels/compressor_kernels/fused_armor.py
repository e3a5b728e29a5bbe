"""The two launches of ARMOR, y = A (S (B x)): B x in fragment order, then S by `mma.sp` and A where
the sums come together.

The programs whose rows share blocks of A form a group; the last of it to arrive adds up the partial
sums of S x', multiplies them by the blocks and stores. Multiplying by B once, first, costs less
than anywhere else: every program would read all of B.
"""

import triton
import triton.language as tl

from compressor_kernels.mma import accumulate, keep
from compressor_kernels.split import arrive_last, dot, prefetch, store, total


@triton.jit
def apply_b(
    x_ptr, b_ptr, o_ptr, M, K,
    TILES: tl.constexpr, BM: tl.constexpr, SIZE: tl.constexpr, ROWS: tl.constexpr,
    WIDE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """x' = B x. x [M, K], b [K / SIZE, SIZE, SIZE], o [K / 64, TILES, 2, 32, 8] (mma.order); grid
    (K / SIZE, SIZE / ROWS).

    PDL: let the next kernel be launched while this one runs.
    """
    block = tl.program_id(0)
    r = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    c = tl.arange(0, SIZE)
    m = tl.arange(0, BM)[None, :]
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
    b = tl.load(b_ptr + (block * SIZE + r) * SIZE + c[None, :])
    x = tl.load(x_ptr + m * K + block * SIZE + c[:, None], mask=m < M, other=0)
    y = dot(b, x, tl.zeros((ROWS, BM), tl.float32), WIDE)
    k = block * SIZE + r
    pair = k % 32 // 2
    lane = m % 8 * 4 + pair % 4
    place = (
        (((k // 64 * TILES + m // 8) * 2 + k % 64 // 32) * 32 + lane) * 8 + pair // 4 * 2 + k % 2
    )
    tl.store(o_ptr + place, y.to(o_ptr.dtype.element_ty), mask=m < 8 * TILES)


@triton.jit
def _sums(part_ptr, n, m, tiles, PARTS: tl.constexpr, TILES: tl.constexpr):
    """Rows n [R, 1] and columns m [1, C] of S x', added up from where `mma.keep` put the fragments
    of `tiles` row tiles.
    """
    place = (
        (n // 16 * TILES + m // 8) * 128 + (n % 8 * 4 + m % 8 // 2) * 4 + n % 16 // 8 * 2 + m % 2
    )
    return total(part_ptr + place, tiles * TILES * 128, (m < 8 * TILES) & (n < 16 * tiles), PARTS)


@triton.jit
def product(
    x_ptr, v_ptr, m_ptr, a_ptr, bias_ptr, part_ptr, sem_ptr, y_ptr, M, N, K, KT, NT,
    WARPS: tl.constexpr, STACK: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
    UNROLL: tl.constexpr,
    PARTS: tl.constexpr, BM: tl.constexpr, SIZE: tl.constexpr, PIECE: tl.constexpr,
    BF16: tl.constexpr, BIAS: tl.constexpr, WIDE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """y = A (S x') + bias, K a multiple of 64. x' from `apply_b`, v and m as in mma.product, a [N /
    SIZE, SIZE, SIZE], y [M, N].

    Grid (NT / (STACK · ROWS), PARTS of K); one semaphore a group of programs. A is multiplied PIECE
    columns at a time.
    """
    height: tl.constexpr = 16 * STACK * ROWS
    if tl.program_id(1) == 0:  # A will be wanted at once when the sums are there
        line = tl.program_id(0) * height * SIZE + tl.arange(0, height * SIZE // 64) * 64
        prefetch(a_ptr + tl.minimum(line, N * SIZE - 1))
    sums = accumulate(
        x_ptr, v_ptr, m_ptr, M, K, KT, NT, WARPS, STACK, ROWS, TILES, UNROLL, PARTS, True, True,
        BF16, PDL
    )  # fmt: skip
    keep(sums, part_ptr, STACK, ROWS, TILES)
    programs = tl.num_programs(0)
    members: tl.constexpr = SIZE // height if height < SIZE else 1
    blocks: tl.constexpr = members * height // SIZE
    group = tl.program_id(0) // members
    here = tl.minimum(members, programs - group * members)
    if arrive_last(sem_ptr + group, here * PARTS):
        r = tl.arange(0, SIZE)[:, None]
        m = tl.arange(0, BM)[None, :]
        c = tl.arange(0, PIECE)
        for block in range(group * blocks, tl.minimum(group * blocks + blocks, N // SIZE)):
            acc = tl.zeros((SIZE, BM), tl.float32)
            for first in tl.static_range(0, SIZE, PIECE):
                z = _sums(
                    part_ptr,
                    block * SIZE + first + c[:, None],
                    m,
                    programs * STACK * ROWS,
                    PARTS,
                    TILES,
                )
                a = tl.load(a_ptr + (block * SIZE + r) * SIZE + first + c[None, :])
                acc = dot(a, z.to(a.dtype), acc, WIDE)
            n = block * SIZE + r
            store(acc, m * N + n, n, (m < M) & (n < N), bias_ptr, y_ptr, BIAS)
        tl.store(sem_ptr + group, 0)
