"""What the products share. Reductions are split over programs without a second launch, a memset or an atomic on the result.

Each of `parts` programs stores its float32 partial sums and adds one to a semaphore. The one that arrives last adds them up
in their order, so that the result does not depend on who was last, and puts the semaphore back to zero for the next call.
"""

import triton
import triton.language as tl


@triton.jit
def arrive_last(sem_ptr, parts):
    """True in the program that is the last of `parts` to arrive; what the others stored is visible to it."""
    tl.debug_barrier()  # all threads of this program have stored
    arrived = tl.atomic_add(sem_ptr, 1, sem="acq_rel")
    tl.debug_barrier()
    return arrived == parts - 1


@triton.jit
def dot(a, b, acc, WIDE: tl.constexpr):
    """acc + a b. WIDE: in float32, for the interpreter, which multiplies the bits of bfloat16 as if they were integers."""
    if WIDE:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc)
    return tl.dot(a, b, acc)


@triton.jit
def store(acc, place, n, mask, bias_ptr, y_ptr, BIAS: tl.constexpr):
    """y[place] = acc + bias[n], rounded once."""
    if BIAS:
        acc += tl.load(bias_ptr + n, mask=mask, other=0).to(tl.float32)
    tl.store(y_ptr + place, acc.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def finish(acc, place, n, mask, index, count, part_ptr, sem_ptr, bias_ptr, y_ptr, SPLIT: tl.constexpr, BIAS: tl.constexpr):
    """Store a tile; with SPLIT it is the sum of what all programs of the second axis of the grid bring.

    `acc` [R, C] float32 is this program's part of tile `index` of `count`; `place` and `n` are the offsets in y and bias.
    """
    if not SPLIT:
        store(acc, place, n, mask, bias_ptr, y_ptr, BIAS)
    else:
        parts = tl.num_programs(1)
        size: tl.constexpr = acc.shape[0] * acc.shape[1]
        own = tl.arange(0, acc.shape[0])[:, None] * acc.shape[1] + tl.arange(0, acc.shape[1])[None, :]
        tl.store(part_ptr + (tl.program_id(1) * count + index) * size + own, acc)
        if arrive_last(sem_ptr + index, parts):
            total = tl.zeros_like(acc)
            for part in range(parts):
                total += tl.load(part_ptr + (part * count + index) * size + own, cache_modifier=".cg")
            tl.store(sem_ptr + index, 0)
            store(total, place, n, mask, bias_ptr, y_ptr, BIAS)
