"""Whether `mma.sp` does on a device what its tables say: asked once, by a small product.

The hardware's layout of a sparse fragment cannot be read anywhere but in the manual, so it is tried
before it is trusted.
"""

from __future__ import annotations

import warnings
from functools import cache

import torch

from compressor_kernels import backend
from compressor_kernels.fragments import to_fragments
from compressor_kernels.packing import pack24
from compressor_kernels.sparse24 import new_semaphore, run_fragments


@cache
def sparse_tensor_cores(device: torch.device) -> bool:
    """`mma.sp` exists (compute capability 8.0 and later) and gave the right result; if it did not,
    a warning says why.
    """
    if device.type != "cuda":
        return backend.interpreting()
    if not backend.nvidia() or torch.cuda.get_device_capability(device) < (8, 0):
        return False
    try:
        right, reason = fragments_are_right(device), "a small product came out wrong"
    except Exception as error:  # a Triton that cannot compile it
        right, reason = False, (str(error).strip() or type(error).__name__).splitlines()[0]
    if not right:
        warnings.warn(
            f"the sparse tensor cores of {device} are not used, a slower kernel is: {reason}",
            stacklevel=2,
        )
    return right


def fragments_are_right(device: torch.device) -> bool:
    """`mma` gives on `device` what the twin gives: both steps, both halves, K in two parts."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, 256, generator=generator).view(48, 64, 4)
    weight = weight * (weight.argsort(-1).argsort(-1) > 1)  # two in every group
    weight = weight.view(48, 256).to(device, torch.float16)
    x = torch.randn(11, 256, generator=generator).to(device, torch.float16)
    config = {"kernel": "mma", "warps": 4, "stack": 2, "row_tiles": 1, "split": 2}
    config |= {"unroll": 1, "ordered": False}
    fragments, semaphore = to_fragments(*pack24(weight)), new_semaphore(48, device)
    y = run_fragments(x, fragments, 48, None, semaphore, config).double()
    expected = x.double() @ weight.double().T
    return bool((y - expected).norm() < 1e-3 * expected.norm())
