"""One threshold for the whole model on what a parameter buys: the exact optimum of Σ dropped S²
under a budget of parameters.

Rank k of a linear costs k (out + in - k) parameters and drops the tail Σ_{i>k} S_i², dense costs
out · in and drops nothing. For a price λ of a parameter each linear takes what makes tail + λ ·
parameters least, looked for among all its ranks: the marginal cost falls, so that many ranks at
once may pay where the next one does not. Parameters fall as λ rises; bisection finds the λ that
meets the budget, and what is left of it buys the most valuable runs of ranks that still fit.
Squares have to be comparable between linears: see `spectrum` of each method.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from heapq import heappop, heappush

import torch
from torch import Tensor

from compressor.allocation.rank import Ranks, Spectrum, check_align, largest_rank, parameters, step
from compressor.errors import UsageError

_HALVINGS = 100
NEEDS_SPECTRA = True


@dataclass(frozen=True)
class _Curve:
    """What the ranks `sizes` of one linear cost and drop, and `dense` parameters without dropping
    anything.
    """

    sizes: list[int]
    costs: Tensor
    tails: Tensor
    dense: int

    def best(self, price: float) -> int | None:
        """The rank with the smallest tail + price · parameters; None for dense. At equal cost the
        fewer parameters.
        """
        costs = self.tails + price * self.costs
        if not len(costs) or float(costs.min()) > price * self.dense:
            return None
        return self.sizes[int(costs.argmin())]

    def raised(self, rank: int | None, left: int) -> tuple[float, int, int]:
        """Of the ranks above `rank` that `left` parameters pay for, the one with most tail a
        parameter: that, the rank, and what it costs. Zeros where there is none.
        """
        if rank is None:
            return 0.0, 0, 0
        start = self.sizes.index(rank)
        costs = self.costs[start + 1 :] - self.costs[start]
        gains = (self.tails[start] - self.tails[start + 1 :]) / costs
        gains = gains[: int((costs <= left).sum())]
        if not len(gains):
            return 0.0, 0, 0
        place = int(gains.argmax())
        return float(gains[place]), self.sizes[start + 1 + place], int(costs[place])


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
    return _spend(spectra, curves, ranks_at(high), budget)


def _curve(spectrum: Spectrum, align: int) -> _Curve:
    squares = spectrum.values.double().square()
    dropped = torch.cat(
        [squares.flip(0).cumsum(0).flip(0), squares.new_zeros(1)]
    )  # [i] = Σ of all from the i-th on
    size = step(spectrum.shape, align)
    sizes = list(range(size, min(largest_rank(spectrum.shape), len(squares)) + 1, size))
    costs = torch.tensor([spectrum.parameters(rank) for rank in sizes], dtype=torch.float64)
    return _Curve(sizes, costs, dropped[sizes], spectrum.size)


def _spend(
    spectra: Mapping[str, Spectrum], curves: Mapping[str, _Curve], ranks: Ranks, budget: int
) -> Ranks:
    """Raise ranks by runs of steps, the most valuable first, while they fit."""
    left, ranks = budget - parameters(spectra, ranks), dict(ranks)
    last_first = {name: -place for place, name in enumerate(sorted(spectra))}
    offers: list[tuple[float, int, str]] = []  # of equal ones the last name counts

    def offer(name: str) -> None:
        gain, _, _ = curves[name].raised(ranks[name], left)
        if gain > 0:
            heappush(offers, (-gain, last_first[name], name))

    for name in spectra:
        offer(name)
    while offers:
        gain, _, name = heappop(offers)
        now, rank, cost = curves[name].raised(ranks[name], left)
        if now == -gain:  # else it no longer fits
            ranks[name] = rank
            left -= cost
        offer(name)
    return ranks
