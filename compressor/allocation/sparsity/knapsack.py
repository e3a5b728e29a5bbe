"""The cheapest way to a total: zeros among curves of their cost, and items into a budget.

`share_out` minimises Σ_l E_l(z_l) subject to Σ_l z_l = zeros, z_l whole and at most the last point
of curve l. Each curve is replaced by its lower convex hull, drawn straight between the points; then
the segments of all hulls, taken in the order of their slopes until the total is reached, are the
exact optimum (Everett 1963, the Lagrangian method), and at most one segment is taken in part.

`choose` maximises Σ of the values of the chosen items whose sizes fit a budget (0/1 knapsack by
dynamic programming).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np

from compressor.errors import NumericalError, UsageError

Curve = Sequence[tuple[int, float]]
"""Points (zeros, error) of one linear or group, zeros rising."""

_UNITS = 50_000  # steps the budget of `best_set` is counted in at most


def share_out(curves: Mapping[str, Curve], zeros: int) -> dict[str, int]:
    """Zeros of each curve, `zeros` in all.

    Args:
        curves: of each name; the first point is the least it can get, the last the most.
        zeros: the total.

    Raises:
        UsageError: the curves end below, or begin above, the total.
        NumericalError: an error that is not finite.
    """
    least, most = (sum(curve[end][0] for curve in curves.values()) for end in (0, -1))
    if not least <= zeros <= most:
        raise UsageError(
            f"{zeros} zeros are asked for, but the linears can take {least} to {most}: raise "
            f"max_sparsity"
        )
    for name, curve in curves.items():
        if not all(math.isfinite(error) for _, error in curve):
            raise NumericalError(f"the error curve of {name} is not finite")
    found = {name: curve[0][0] for name, curve in curves.items()}
    segments = [
        ((stop[1] - start[1]) / (stop[0] - start[0]), start[0], name, stop[0] - start[0])
        for name, curve in curves.items()
        for start, stop in pairwise(lower_hull(curve))
    ]
    left = zeros - least
    for _, _, name, length in sorted(segments):
        taken = min(length, left)
        found[name] += taken
        left -= taken
    return found


def lower_hull(curve: Curve) -> list[tuple[int, float]]:
    """The points of the largest convex function below a curve."""
    hull: list[tuple[int, float]] = []
    for x, y in curve:
        while len(hull) > 1 and (y - hull[-1][1]) * (hull[-1][0] - hull[-2][0]) <= (
            hull[-1][1] - hull[-2][1]
        ) * (x - hull[-1][0]):
            hull.pop()
        hull.append((x, y))
    return hull


def best_set(values: Mapping[str, float], sizes: Mapping[str, int], budget: int) -> set[str]:
    """The names with the largest total value whose sizes sum to at most `budget`.

    Where the sizes have no large common divisor they are rounded up to one part in 50 000 of the
        budget: the choice always fits.
    """
    fitting = [name for name in values if 0 < sizes[name] <= budget and values[name] > 0]
    if not fitting:
        return set()
    unit = max(math.gcd(*(sizes[name] for name in fitting)), -(-budget // _UNITS))
    capacity = budget // unit
    best = np.zeros(capacity + 1)
    taken = np.zeros((len(fitting), capacity + 1), dtype=bool)
    for index, name in enumerate(fitting):
        size = -(-sizes[name] // unit)
        if size <= capacity:
            with_it = best[: capacity + 1 - size] + values[name]
            taken[index, size:] = with_it > best[size:]
            best[size:] = np.maximum(best[size:], with_it)
    chosen, left = set(), capacity
    for index in reversed(range(len(fitting))):
        if taken[index, left]:
            chosen.add(fitting[index])
            left -= -(-sizes[fitting[index]] // unit)
    return chosen
