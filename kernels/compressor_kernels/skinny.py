"""y = x Wᵀ + bias for few rows of x and a dense W, K split over programs: the two products of a
low-rank weight.
"""

import triton
import triton.language as tl

from compressor_kernels.split import dot, finish, synchronous


@triton.jit
def product(
    x_ptr, w_ptr, bias_ptr, part_ptr, sem_ptr, y_ptr, M, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, PARTS: tl.constexpr, BIAS: tl.constexpr,
    WIDE: tl.constexpr,
):  # fmt: skip
    """x [M, K], w [N, K], y [M, N]; grid (N / BN, PARTS of K, M / BM), rounded up."""
    synchronous(BN)
    n = tl.program_id(0) * BN + tl.arange(0, BN)[:, None]
    m = tl.program_id(2) * BM + tl.arange(0, BM)[None, :]
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
    index = tl.program_id(2) * tl.num_programs(0) + tl.program_id(0)
    count = tl.num_programs(0) * tl.num_programs(2)
    mask = (m < M) & (n < N)
    finish(acc, m * N + n, n, mask, index, count, part_ptr, sem_ptr, bias_ptr, y_ptr, PARTS, BIAS)
