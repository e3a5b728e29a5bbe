"""Numbers of quantised tensors that several formats share: scales, and floats of four bits.

OCP Microscaling Formats (MX) 1.0: E8M0 is a power of two in one byte, 2^(byte - 127), 255 for NaN;
E2M1 a sign, two bits of exponent and one of mantissa. No torch at import.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from compressor.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # and the same below zero


def scale_factors(scales: Tensor, name: str) -> Tensor:
    """Stored scales as float32 factors of the same shape; bytes are powers of two.

    Raises:
        CheckpointError: one is NaN or Inf; `name` is that of the tensor.
    """
    import torch

    if scales.dtype == torch.uint8:
        scales = scales.view(torch.float8_e8m0fnu)
    factors = scales.float()
    if not bool(torch.isfinite(factors).all()):
        kind = "NaN" if bool(factors.isnan().any()) else "Inf"
        raise CheckpointError(f"{name} holds {kind}: its weight cannot be known")
    return factors


def e2m1_pairs(stored: Tensor) -> Tensor:
    """Bytes `[.., n]` of two E2M1 numbers each, the lower half first, as float32 `[.., 2n]`."""
    import torch

    numbers = torch.tensor([*_E2M1, *(-number for number in _E2M1)])
    every = torch.arange(256)
    pairs = torch.stack([numbers[every & 15], numbers[every >> 4]], dim=-1)  # of each byte
    return pairs[stored.view(torch.uint8).int()].flatten(-2)
