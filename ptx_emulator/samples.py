"""Small kernels for the tests of the emulator."""

import triton
import triton.language as tl


@triton.jit
def copy(x_ptr, y_ptr, N, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = place < (N if MASKED else N + BLOCK)
    tl.store(y_ptr + place, tl.load(x_ptr + place, mask=mask), mask=mask)
