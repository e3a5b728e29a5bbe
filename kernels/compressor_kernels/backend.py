"""Where the Triton kernels run. Asked at the first call, never at import: this package loads
without a GPU and without Triton.
"""

from __future__ import annotations

import os
import warnings
from functools import cache
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16)


@cache
def interpreting() -> bool:
    """Triton runs kernels in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def runs(x: Tensor) -> bool:
    """The kernels can compute with `x`: 16-bit, and on a GPU that Triton compiles for, or in the
    interpreter.
    """
    if x.dtype not in DTYPES:
        return False
    return interpreting() if x.device.type == "cpu" else x.device.type == "cuda" and works(x.device)


@cache
def works(device: torch.device) -> bool:
    """A kernel was compiled and run on this CUDA device; if not, a warning says why, once, and
    plain torch computes instead.
    """
    try:
        from compressor_kernels.decompress import unpack_stored

        values = torch.zeros(1, 8, dtype=torch.float16, device=device)
        dense = torch.empty(1, 16, dtype=torch.float16, device=device)
        metadata = torch.full((1, 1), 0x4444, dtype=torch.int16, device=device)
        launch(
            unpack_stored,
            (1, 1),
            words(values),
            metadata,
            words(dense),
            1,
            16,
            BN=16,
            BK=64,
            ASM=nvidia(),
        )
    except Exception as error:  # no Triton, no C compiler, an unknown GPU: anything may be thrown
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        warnings.warn(
            f"the kernels of compress-llm do not run on {device}, which computes with torch: "
            f"{reason}",
            stacklevel=2,
        )
        return False
    return True


def nvidia() -> bool:
    """PTX can be used."""
    return torch.version.cuda is not None or interpreting()


@cache
def hopper(device: torch.device) -> bool:
    """Compute capability 9.0 or later: launches may overlap, and the tensor cores take a matrix
    from shared memory.
    """
    return device.type == "cuda" and nvidia() and torch.cuda.get_device_capability(device) >= (9, 0)


@cache
def multiprocessors(device: torch.device) -> int:
    """How many programs run at once, at least."""
    return (
        torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else 1
    )


@cache
def device_name(device: torch.device) -> str:
    """As the table of choices names it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    *arguments: Any,
    counter: Tensor | None = None,
    pdl: bool = False,
    **settings: Any,
) -> None:
    """Start a kernel on the device of its first argument.

    Args:
        kernel: a Triton function.
        grid: how many programs, along each axis.
        arguments: of the kernel.
        counter: the semaphore among the arguments that its programs count in, if they do. A launch
            that ends in an exception half way leaves it at zero: otherwise every later call would
            take the wrong program for the last.
        pdl: start before the kernel ahead of it has ended (it waits inside).
        settings: constants of the kernel, and Triton's own.
    """
    if pdl:
        settings["launch_pdl"] = True
    try:
        with torch.cuda.device_of(arguments[0]):
            kernel[grid](*arguments, **settings)
    except BaseException:
        if counter is not None:
            counter.zero_()
        raise


def power_of_two(number: int) -> int:
    """The least that is at least `number`. Triton's own function takes 15 µs a call."""
    return 1 << (number - 1).bit_length()


def words(x: Tensor) -> Tensor:
    """The same memory as int32; a copy where it begins in the middle of a word."""
    return (x.clone() if x.storage_offset() * x.itemsize % 4 else x).view(torch.int32)
