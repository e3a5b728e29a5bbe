"""The search of ARMOR for a 2:4 core, on a CPU: search.cpp on tensors.

Only float32 is computed here, and only where the library could be compiled; `runs` says so.
"""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from compressor_kernels.cpu.build import kernels


def runs(x: Tensor) -> bool:
    """Whether what is done with `x` can be done here."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and _library() is not None


def sweep(
    a_gram: Tensor,
    b_gram: Tensor,
    product: Tensor,
    s: Tensor,
    mask: Tensor,
    order: Tensor,
    heat: Tensor | None,
    uniform: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Every group of four of S re-solved once, given those of its block of columns before it.

    Args:
        a_gram: AᵀA, `[out / bA, bA, bA]`.
        b_gram: BBᵀ, `[in / bB, bB, bB]`.
        product: C = AᵀWBᵀ, `[out, in]`.
        s: `[out, in]`, zero outside `mask`.
        mask: bool `[out, in]`.
        order: of the groups, int64 `[bB / 4]`.
        heat: 0-d temperature of the draws; None takes the best pair, and keeps a block that got
            worse as it was.
        uniform: in [0, 1), `[bB / 4, in / bB, out]`; None without heat.

    Returns:
        S and its mask, new tensors.
    """
    s, mask = _copy(s), _copy(mask)
    temperature = ctypes.c_float(0.0 if heat is None else heat.item())
    _call("compress_armor_sweep", a_gram, b_gram, product, s, mask, order, uniform, temperature)
    return s, mask


def solve(
    a_gram: Tensor, b_gram: Tensor, product: Tensor, s: Tensor, mask: Tensor, steps: int
) -> Tensor:
    """S on its mask by `steps` of conjugate gradients for each block, a new tensor; the arguments
    are those of `sweep`.
    """
    s = _copy(s)
    _call("compress_armor_solve", a_gram, b_gram, product, s, mask, ctypes.c_int64(steps))
    return s


def _copy(x: Tensor) -> Tensor:
    return x.clone(memory_format=torch.contiguous_format)


def _call(name: str, a_gram: Tensor, b_gram: Tensor, *others: Any) -> None:
    library = _library()
    assert library is not None
    sizes = (len(a_gram), a_gram.shape[1], len(b_gram), b_gram.shape[1])
    # kept until the call is over: what was made contiguous for it lives no longer
    given = [each.contiguous() if isinstance(each, Tensor) else each for each in others]
    grams = [a_gram.contiguous(), b_gram.contiguous()]
    places = [
        ctypes.c_void_p(each.data_ptr()) if isinstance(each, Tensor) else each
        for each in [*grams, *given]
    ]
    getattr(library, name)(*map(ctypes.c_int64, sizes), *places)


@cache
def _library() -> ctypes.CDLL | None:
    found = kernels()
    return None if found.path is None else ctypes.CDLL(str(found.path))
