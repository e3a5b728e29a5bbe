"""What the products share. Reductions are split over programs without a second launch, a memset or
an atomic on the result.

Each of PARTS programs stores its float32 partial sums and adds one to a semaphore. The one that
arrives last adds them up in their order, so that the result does not depend on who was last, and
puts the semaphore back to zero for the next call.
"""

import triton
import triton.language as tl

ISSUED = tl.constexpr("""bar.warp.sync 0xffffffff;
mov.b32 $0, $1;""")
PREFETCH = tl.constexpr("""prefetch.global.L2 [$1];
mov.b32 $0, 0;""")


@triton.jit
def issued(lane):
    """All loads above are under way before those below, and before what needs those; `lane` is
    int32, one element a thread.

    To save registers the assembler would put each load where its result is used, and wait for one
    after the other.
    """
    tl.inline_asm_elementwise(ISSUED, "=r,r", [lane], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def prefetch(place):
    """Bring what the pointers point to into the L2 cache, where it stays right even if another
    kernel still writes it.
    """
    tl.inline_asm_elementwise(
        PREFETCH, "=r,l", [place.to(tl.int64)], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def arrive_last(sem_ptr, parts):
    """True in the program that is the last of `parts` to arrive; what the others stored is visible
    to it.
    """
    tl.debug_barrier()  # all threads of this program have stored
    arrived = tl.atomic_add(sem_ptr, 1, sem="acq_rel")
    tl.debug_barrier()
    return arrived == parts - 1


@triton.jit
def total(place, stride, mask, PARTS: tl.constexpr):
    """Sum of the parts at `place`, `stride` apart, in their order; no load of one waits for
    another.
    """
    parts = ()
    for part in tl.static_range(PARTS):
        parts = parts + (tl.load(place + part * stride, mask=mask, other=0, cache_modifier=".cg"),)
    acc = parts[0]
    for part in tl.static_range(1, PARTS):
        acc += parts[part]
    return acc


@triton.jit
def synchronous(BN: tl.constexpr):
    """Assert that products of BN rows are not asynchronous on Hopper.

    For 64 rows and more Triton takes wgmma. Triton 3.6 leaves out the fence between it and
    asynchronous copies (mended in 3.7.1), and its operands in registers may be overwritten too
    early by ptxas before CUDA 13.3 (Triton issue 11781).
    """
    tl.static_assert(BN < 64)


@triton.jit
def dot(a, b, acc, WIDE: tl.constexpr):
    """acc + a b. WIDE: in float32, for the interpreter, which multiplies the bits of bfloat16 as if
    they were integers.
    """
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
def finish(
    acc,
    place,
    n,
    mask,
    index,
    count,
    part_ptr,
    sem_ptr,
    bias_ptr,
    y_ptr,
    PARTS: tl.constexpr,
    BIAS: tl.constexpr,
):
    """Store a tile; with PARTS > 1 it is the sum of what all programs of the second axis of the
    grid bring.

    `acc` [R, C] float32 is this program's part of tile `index` of `count`; `place` and `n` are the
    offsets in y and bias.
    """
    if PARTS == 1:
        store(acc, place, n, mask, bias_ptr, y_ptr, BIAS)
    else:
        size: tl.constexpr = acc.shape[0] * acc.shape[1]
        own = (
            tl.arange(0, acc.shape[0])[:, None] * acc.shape[1] + tl.arange(0, acc.shape[1])[None, :]
        )
        tl.store(part_ptr + (tl.program_id(1) * count + index) * size + own, acc, mask=mask)
        if arrive_last(sem_ptr + index, PARTS):
            acc = total(part_ptr + index * size + own, count * size, mask, PARTS)
            tl.store(sem_ptr + index, 0)
            store(acc, place, n, mask, bias_ptr, y_ptr, BIAS)
