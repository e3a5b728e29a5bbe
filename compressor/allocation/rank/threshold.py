"""One threshold for the whole model on what a parameter buys: the exact optimum of Σ dropped S²
under a budget of parameters.

A unit of rank of a linear costs out + in parameters and lowers the dropped tail by S_i²; S
descends, so for a price λ of a parameter the best rank is the number of i with S_i² / (out + in) >
λ. Dense costs λ · out · in and drops nothing, and is taken where that is cheaper. Parameters fall
as λ rises; bisection finds the λ that meets the budget, and what is left of it buys the most
valuable units that still fit. Squares have to be comparable between linears: see `spectrum` of each
method.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from heapq import heapify, heappop, heappush

import torch
from torch import Tensor

from compressor.allocation.rank import Ranks, Spectrum, check_align, largest_rank, parameters, step
from compressor.errors import UsageError

_HALVINGS = 100
NEEDS_SPECTRA = True


@dataclass(frozen=True)
class _Curve:
    """What the ranks `sizes` of one linear drop: `tails` of them, and `dense` parameters without
    dropping anything.
    """

    sizes: Tensor
    tails: Tensor
    cost: int
    dense: int

    def best(self, price: float) -> int | None:
        """The rank with the smallest tail + price · parameters; None for dense. At equal cost the
        fewer parameters.
        """
        costs = self.tails + price * self.cost * self.sizes
        if not len(costs) or float(costs.min()) > price * self.dense:
            return None
        return int(self.sizes[int(costs.argmin())])


def allocate(spectra: Mapping[str, Spectrum], budget: int, *, align: int = 0) -> Ranks:
    """Ranks by one price of a parameter.

    Args:
        spectra: singular values whose squares are losses in one unit.
        budget: parameters of all linears together, at most.
        align: ranks are multiples of it; 0 for 16, less where matrices are tiny.

    Raises:
        UsageError: the budget does not pay for one step of rank in every linear.
    """
    check_align(align)
    curves = {name: _curve(spectrum, align) for name, spectrum in spectra.items()}

    def ranks_at(price: float) -> Ranks:
        return {name: curve.best(price) for name, curve in curves.items()}

    low, high = 0.0, 1.0
    while parameters(spectra, ranks_at(high)) > budget:
        low, high = high, high * 16
        if high > 1e300:
            least = parameters(spectra, ranks_at(high)) / sum(
                spectrum.size for spectrum in spectra.values()
            )
            raise UsageError(
                f"so few parameters cannot be kept: the smallest factors keep {least:.1%}; raise "
                f"`keep`"
            )
    for _ in range(_HALVINGS):
        middle = (
            (low + high) / 2 if low > high / 4 else high / 16 if low == 0 else (low * high) ** 0.5
        )
        if parameters(spectra, ranks_at(middle)) > budget:
            low = middle
        else:
            high = middle
    return _spend(spectra, curves, ranks_at(high), budget, align)


def _curve(spectrum: Spectrum, align: int) -> _Curve:
    squares = spectrum.values.double().square()
    dropped = torch.cat(
        [squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)]
    )  # [i] = Σ of all from the i-th on
    size = step(spectrum.shape, align)
    sizes = torch.arange(size, min(largest_rank(spectrum.shape), len(squares)) + 1, size)
    return _Curve(sizes, dropped[sizes], sum(spectrum.shape), spectrum.size)


def _spend(
    spectra: Mapping[str, Spectrum],
    curves: Mapping[str, _Curve],
    ranks: Ranks,
    budget: int,
    align: int,
) -> Ranks:
    """Raise ranks by single steps, the most valuable first, while they fit."""
    left, ranks = budget - parameters(spectra, ranks), dict(ranks)
    steps = {name: step(spectrum.shape, align) for name, spectrum in spectra.items()}
    last_first = {name: -place for place, name in enumerate(sorted(spectra))}

    def offer(name: str) -> list[tuple[float, int, str]]:
        """What one more step of a linear is worth a parameter, negative: a heap gives the least
        first. Of equal ones the last name counts.
        """
        curve, rank, size = curves[name], ranks[name], steps[name]
        if rank is None or rank >= int(curve.sizes[-1]):
            return []
        index = rank // size - 1
        gain = float(curve.tails[index] - curve.tails[index + 1]) / (size * curve.cost)
        return [(-gain, last_first[name], name)]

    offers = [each for name in spectra for each in offer(name)]
    heapify(offers)
    while offers:
        negative_gain, _, name = heappop(offers)
        cost = steps[name] * curves[name].cost
        if negative_gain >= 0:
            break
        if cost <= left:  # what does not fit now never will
            ranks[name] = (ranks[name] or 0) + steps[name]
            left -= cost
            for each in offer(name):
                heappush(offers, each)
    return ranks
