"""Plain truncated SVD: the nearest weight of a rank, ‖W - U V‖_F, blind to the inputs. A
baseline.
"""

from __future__ import annotations

from torch import Tensor

from compressor.formats.pivot import Pivot
from compressor.methods.factor import singular_values, truncate
from compressor.stats import InputStats

NEEDS_INPUTS = False
NEEDS_GRAM = False
REFINABLE = False
NEEDS_GRADIENTS = False
RANKS = "uniform"


def spectrum(weight: Tensor, stats: InputStats | None) -> Tensor:
    """σ(W), `[min(out, in)]`."""
    return singular_values(weight)


def compress(weight: Tensor, stats: InputStats | None, rank: int) -> Pivot:
    """The factors of the `rank` largest singular values of `weight` `[out, in]`; `stats` is not
    looked at.
    """
    return truncate(weight, rank)
