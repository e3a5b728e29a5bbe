"""Ranks: how many of the parameters each factored linear gets; one file per allocator, the file
name is the option's value.

An allocator is a module: docstring with the paper, its URL and formula; `NEEDS_SPECTRA`, whether
it looks at more than the shapes; and a function `allocate(spectra, budget, *, align=0,
option=default, …) -> ranks`, whose keyword-only parameters are its options.

    spectra   name -> Spectrum: shape and singular values of each linear, in the metric of the
              method
    budget    parameters of all linears together, at most
    align     ranks are multiples of it; 0 for the rule of `step`
    ranks     name -> rank, or None where the linear stays dense

A linear of rank k is stored as k (out + in - k) numbers (compressor/formats/pivot.py): what one
more rank costs falls as k rises, out + in - 2 k - 1. No allocator gives a linear a rank that makes
it no smaller.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from importlib import import_module
from math import isqrt
from types import ModuleType
from typing import TYPE_CHECKING

from compressor.errors import UsageError, did_you_mean
from compressor.formats.pivot import numbers

if TYPE_CHECKING:  # the names below are shown by help, which does without torch
    from torch import Tensor

ALLOCATORS = ["uniform", "welore", "threshold"]
Ranks = dict[str, int | None]


@dataclass(frozen=True)
class Spectrum:
    """Of one linear.

    Attributes:
        shape: (out, in).
        values: singular values, descending, float64 `[min(out, in)]`; empty for allocators that
            look at shapes only.
    """

    shape: tuple[int, int]
    values: Tensor

    @property
    def size(self) -> int:
        """Weights of the dense linear."""
        return self.shape[0] * self.shape[1]

    def parameters(self, rank: int | None) -> int:
        """Numbers stored at `rank`; None is dense."""
        return self.size if rank is None else numbers(rank, self.shape)


def allocator(name: str) -> ModuleType:
    """The module of the allocator called `name`. Raises UsageError for an unknown name."""
    if name not in ALLOCATORS:
        raise UsageError(
            f"unknown ranks {name!r}; known: "
            f"{', '.join(ALLOCATORS)}{did_you_mean(name, ALLOCATORS)}"
        )
    return import_module(f"compressor.allocation.rank.{name}")


def largest_rank(shape: tuple[int, int]) -> int:
    """The largest rank that is stored in fewer bytes than the weight, 0 where there is none: the
    numbers, k (out + in - k), and the indices of k rows, which have the bytes of two numbers each.
    """
    return _largest(shape, shape[0] * shape[1] - 1, 2)


def _largest(shape: tuple[int, int], most: int, indices: int = 0) -> int:
    """The largest k up to min(out, in) with k (out + in - k + indices) <= most."""
    half = sum(shape) + indices  # k² - half · k + most = 0 has it as its smaller root
    if most >= min(shape) * (half - min(shape)):
        return min(shape)
    root = isqrt(half * half - 4 * most)
    rank = (half - root) // 2
    return rank if rank * (half - rank) <= most else rank - 1


def step(shape: tuple[int, int], align: int = 0) -> int:
    """What the ranks of a linear are multiples of: `align`, by default 16, which is what tensor
    cores multiply.

    Where 16 would leave fewer than 16 ranks to choose from (a largest rank below 256) it is the
    power of two that leaves at least 16, or 1.
    """
    if align:
        return align
    size = 16
    while size > 1 and largest_rank(shape) < 16 * size:
        size //= 2
    return size


def rounded_down(rank: int, shape: tuple[int, int], align: int = 0) -> int:
    """The largest multiple of `step` that is not above `rank`; 0 where there is none."""
    return rank // step(shape, align) * step(shape, align)


def rank_keeping(shape: tuple[int, int], keep: Fraction) -> int:
    """The largest rank with no more than `keep` of the parameters, a multiple of `step` if
    possible; 0 for none.
    """
    most = min(_largest(shape, int(keep * shape[0] * shape[1])), largest_rank(shape))
    return rounded_down(most, shape) or most


def check_align(align: int) -> None:
    """Raise UsageError where `align` is negative."""
    if align < 0:
        raise UsageError(
            f"align is {align}; accepted: 1 or more, or 0 for 16 (less where matrices are tiny)"
        )


def check_some(ranks: Ranks, keep: Fraction) -> Ranks:
    """The ranks themselves. Raises UsageError where no linear has one."""
    if not any(ranks.values()):
        raise UsageError(
            f"keeping {float(keep):.1%} leaves every linear dense: factors would be no smaller; "
            f"lower `keep`"
        )
    return ranks


def parameters(spectra: Mapping[str, Spectrum], ranks: Mapping[str, int | None]) -> int:
    """Numbers stored in all linears together."""
    return sum(spectrum.parameters(ranks[name]) for name, spectrum in spectra.items())


def largest_fitting(
    cuts: Sequence[float],
    ranks_at: Callable[[float], Ranks],
    spectra: Mapping[str, Spectrum],
    budget: int,
) -> Ranks:
    """Of the ranks at ascending `cuts`, each of which gives no more parameters than the one before,
    the first within `budget`.

    Raises:
        UsageError: not even the last is.
    """
    low, high = 0, len(cuts)
    while low < high:
        middle = (low + high) // 2
        if parameters(spectra, ranks_at(cuts[middle])) <= budget:
            high = middle
        else:
            low = middle + 1
    if low == len(cuts):
        least = parameters(spectra, ranks_at(cuts[-1])) / sum(
            spectrum.size for spectrum in spectra.values()
        )
        raise UsageError(
            f"so few parameters cannot be kept: the smallest factors allowed keep {least:.1%}; "
            f"raise `keep`"
        )
    return ranks_at(cuts[low])
