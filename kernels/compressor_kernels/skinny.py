"""y = x Wᵀ + bias for few rows of x and a dense W, K split over programs: the two products of a
low-rank weight; and the second of a weight that is stored by pivots.
"""

import triton
import triton.language as tl

from compressor_kernels.split import dot, finish, store, synchronous


@triton.jit
def product(
    x_ptr, w_ptr, bias_ptr, part_ptr, sem_ptr, y_ptr, M, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr, BIAS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """x [M, K], w [N, K], y [M, N]; grid (N / BN, PARTS of K, M / BM), rounded up."""
    n = tl.program_id(0) * BN + tl.arange(0, BN)[:, None]
    m = tl.program_id(2) * BM + tl.arange(0, BM)[None, :]
    acc = own_part(x_ptr, w_ptr, m, n, M, N, K, BM, BN, BK, PARTS, WIDE)
    index = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    count = tl.num_programs(0) * tl.num_programs(2)
    mask = (m < M) & (n < N)
    finish(acc, m * N + n, n, mask, index, count, part_ptr, sem_ptr, bias_ptr, y_ptr, PARTS, BIAS)


@triton.jit
def scattered(
    t_ptr, c_ptr, rows_ptr, bias_ptr, part_ptr, sem_ptr, y_ptr, M, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr, BIAS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """t [M, K], c [N, K], rows int64 [K + N], y [M, K + N]: columns rows[:K] of y are those of t,
    columns rows[K:] are t cᵀ. The grid is that of `product`; its first part copies t as well.
    """
    n = tl.program_id(0) * BN + tl.arange(0, BN)[:, None]
    m = tl.program_id(2) * BM + tl.arange(0, BM)[None, :]
    if tl.program_id(1) == 0:
        for k0 in range(tl.program_id(0) * BK, K, tl.num_programs(0) * BK):
            k = k0 + tl.arange(0, BK)[:, None]
            own = (m < M) & (k < K)
            t = tl.load(t_ptr + m * K + k, mask=own, other=0).to(tl.float32)
            at = tl.load(rows_ptr + k, mask=k < K, other=0)
            store(t, m * (K + N) + at, at, own, bias_ptr, y_ptr, BIAS)
    acc = own_part(t_ptr, c_ptr, m, n, M, N, K, BM, BN, BK, PARTS, WIDE)
    index = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    count = tl.num_programs(0) * tl.num_programs(2)
    at = tl.load(rows_ptr + K + n, mask=n < N, other=0)
    finish(
        acc, m * (K + N) + at, at, (m < M) & (n < N), index, count,
        part_ptr, sem_ptr, bias_ptr, y_ptr, PARTS, BIAS,
    )  # fmt: skip


@triton.jit
def own_part(
    x_ptr, w_ptr, m, n, M, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """What this program's part of K brings to w[n] xᵀ[m], float32 [BN, BM]."""
    synchronous(BN)
    row = tl.minimum(n, N - 1)
    own = tl.cdiv(tl.cdiv(K, BK), PARTS) * BK
    start = tl.program_id(1) * own
    acc = tl.zeros((BN, BM), dtype=tl.float32)
    for k0 in range(start, tl.minimum(start + own, K), BK):
        k = k0 + tl.arange(0, BK)
        w = tl.load(
            w_ptr + row * K + k[None, :],
            mask=(k < K)[None, :],
            other=0,
            eviction_policy="evict_first",
        )
        x = tl.load(x_ptr + m * K + k[:, None], mask=(m < M) & (k < K)[:, None], other=0)
        acc = dot(w, x, acc, WIDE)
    return acc
