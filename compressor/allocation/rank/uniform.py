"""Uniform: every linear keeps the same fraction of its parameters, the k with k (out + in - k) =
keep · out · in. The one to beat.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction

import torch

from compressor.allocation.rank import (
    Ranks,
    Spectrum,
    check_align,
    check_some,
    largest_rank,
    parameters,
    step,
)
from compressor.errors import UsageError

NEEDS_SPECTRA = False


def of_shapes(shapes: Mapping[str, tuple[int, int]], keep: Fraction, align: int = 0) -> Ranks:
    """The ranks of `allocate` with `keep` of the parameters, by the shapes of the linears.

    Raises:
        UsageError: so few parameters cannot be kept, or so many that no linear would be factored.
    """
    spectra = {name: Spectrum(shape, torch.zeros(0)) for name, shape in shapes.items()}
    return check_some(
        allocate(
            spectra, int(keep * sum(spectrum.size for spectrum in spectra.values())), align=align
        ),
        keep,
    )


def allocate(spectra: Mapping[str, Spectrum], budget: int, *, align: int = 0) -> Ranks:
    """Ranks in proportion, rounded down; what is left of the budget raises those that lost most by
    the rounding.

    Args:
        spectra: shapes of the linears.
        budget: parameters of all of them together, at most.
        align: ranks are multiples of it; 0 for 16, less where matrices are tiny.

    Raises:
        UsageError: the budget does not pay for one step of rank in every linear.
    """
    check_align(align)
    keep = Fraction(budget, sum(spectrum.size for spectrum in spectra.values()))
    steps = {name: step(spectrum.shape, align) for name, spectrum in spectra.items()}
    exact = {name: _exact(spectrum.shape, keep) for name, spectrum in spectra.items()}
    ranks: Ranks = {name: int(exact[name] // steps[name]) * steps[name] for name in spectra}
    left = budget - parameters(spectra, ranks)
    for name in sorted(spectra, key=lambda name: (ranks[name] or 0) - exact[name]):
        shape, raised = spectra[name].shape, (ranks[name] or 0) + steps[name]
        cost = spectra[name].parameters(raised) - spectra[name].parameters(ranks[name] or 0)
        if raised <= largest_rank(shape) and cost <= left:
            ranks[name] = raised
            left -= cost
    if empty := [name for name, rank in ranks.items() if not rank]:
        raise UsageError(
            f"so few parameters leave {empty[0]} without a rank; raise `keep`, or lower "
            f"`rank_options` align"
        )
    return {
        name: rank if rank and rank <= largest_rank(spectra[name].shape) else None
        for name, rank in ranks.items()
    }


def _exact(shape: tuple[int, int], keep: Fraction) -> float:
    """The k, no whole number, with k (out + in - k) = keep · out · in."""
    half = sum(shape) / 2
    return half - (half * half - float(keep) * shape[0] * shape[1]) ** 0.5
