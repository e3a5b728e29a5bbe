"""WeLore's ranks: one threshold on normalised singular values (Jaiswal et al. 2024,
https://arxiv.org/abs/2407.11239, section 3).

With σ̃ = (σ - min σ) / (max σ - min σ), a weight keeps k = #{i : σ̃_i ≥ t}, t the same for all. The
paper takes t from a table per target; here it is the smallest that meets the budget, found among
the values of σ̃ themselves, where alone anything changes. k is rounded up to the step of ranks,
then compared with the break-even (`largest_rank`): a weight that factors would not make
smaller stays dense (N-LRC; the others are LRC).

Two guards. The normalisation hangs on the largest singular value: with one spike, all others seem
negligible and the rank collapses to 1. So k never falls below what holds the fraction `energy` of Σ
σ². And a constant spectrum, where σ̃ is 0/0, stays dense.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from compressor.allocation.rank import (
    Ranks,
    Spectrum,
    check_align,
    largest_fitting,
    largest_rank,
    step,
)
from compressor.errors import UsageError

NEEDS_SPECTRA = True
_CONSTANT = 1e-6  # relative spread of singular values that is rounding


def allocate(
    spectra: Mapping[str, Spectrum], budget: int, *, align: int = 0, energy: float = 0.5
) -> Ranks:
    """Ranks by one threshold.

    Args:
        spectra: singular values of the weights.
        budget: parameters of all of them together, at most.
        align: ranks are multiples of it; 0 for 16, less where matrices are tiny.
        energy: fraction of Σ σ² that every factored weight keeps at least; 0 for the paper's rule
            without a guard.

    Raises:
        UsageError: an option out of range, or a budget that the guards do not allow.
    """
    check_align(align)
    if not 0 <= energy < 1:
        raise UsageError(f"energy is {energy:g}; accepted: 0 to below 1")
    normalised = {name: normalise(spectrum.values) for name, spectrum in spectra.items()}
    floor = {name: _holding(spectrum.values, energy) for name, spectrum in spectra.items()}

    def ranks_at(threshold: float) -> Ranks:
        return {
            name: _gated(spectrum.shape, max(int((values >= threshold).sum()), floor[name]), align)
            if (values := normalised[name]) is not None
            else None
            for name, spectrum in spectra.items()
        }

    pooled = [values for values in normalised.values() if values is not None]
    cuts = torch.cat(pooled).unique().tolist() if pooled else [1.0]
    return largest_fitting(cuts, ranks_at, spectra, budget)


def normalise(values: Tensor) -> Tensor | None:
    """σ̃ of singular values `[r]`, from 0 to 1; None where they are all equal."""
    low, high = values.min(), values.max()
    return None if high - low <= _CONSTANT * high else (values - low) / (high - low)


def _holding(values: Tensor, energy: float) -> int:
    """How many of the largest hold the fraction `energy` of the sum of squares, at least 1."""
    held = values.square().cumsum(0)
    return min(len(values), int((held < energy * held[-1]).sum()) + 1)


def _gated(shape: tuple[int, int], rank: int, align: int) -> int | None:
    """`rank` rounded up to the step of ranks, or None where factors would not be smaller than the
    weight.
    """
    size = step(shape, align)
    rounded = -(-rank // size) * size
    return rounded if rounded <= largest_rank(shape) else None
