"""The model in float32, for measurements that bfloat16 would bury in rounding."""

from __future__ import annotations

import torch

from compressor.calibration import capture
from compressor.calibration.capture import States
from compressor.calibration.gradients import Taps
from compressor.errors import NumericalError
from compressor.model.skeleton import Skeleton
from compressor.text import to_ignore


def check_seen(name: str, tap: Taps) -> None:
    """Raise NumericalError where no token of the calibration reached a linear."""
    if not tap.inputs:
        raise NumericalError(
            f"{name} saw no tokens of that part of the calibration which gradients are measured "
            f"on: "
            f"give more samples, raise ratios.tokens where it applies, or leave it dense with "
            f"{to_ignore(name)}"
        )


def in_float32(
    skeleton: Skeleton, states: States, tokens: int, device: torch.device
) -> tuple[Skeleton, States]:
    """A skeleton that computes in float32, and the first batches of the calibration with at least
    so many tokens in it.
    """
    precise, part = skeleton.in_dtype(torch.float32), states.at_least(tokens)
    if precise is not skeleton:
        ids = torch.cat(part.ids)
        part = capture.capture(precise, ids, device, states.room(), folder=states.folder)
    return precise, part
