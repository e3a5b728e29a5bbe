"""What the options of all allocators accept: checked together, before any work."""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any

from compressor.errors import UsageError

_WORDS = {
    "granularity": ("block", "linear"),
    "labels": ("text", "model"),
    "score": ("first", "product", "zeroth"),
}
_COUNTS = ("tokens", "evaluations")


def check(options: Mapping[str, Any], sparsity: Fraction) -> None:
    """Raise UsageError for a value out of range.

    Args:
        options: those that were given, by name; a name means the same for every allocator that has
            it.
        sparsity: asked for, of all linears together.
    """
    for name, value in options.items():
        what = f"ratios.{name} is {value!r}; accepted:"
        if name in _WORDS and value not in _WORDS[name]:
            raise UsageError(f"{what} {', '.join(_WORDS[name])}")
        if name in _COUNTS and value < 1:
            raise UsageError(f"{what} 1 or more")
        if name in ("outlier", "epsilon") and not value > 0:
            raise UsageError(f"{what} above 0")
        if name == "spread" and not 0 <= value < 0.5:
            raise UsageError(f"{what} 0 or more and below 0.5")
        if name == "max_sparsity" and not 0 <= value <= 1:
            raise UsageError(f"{what} a sparsity up to 1, or 0 for the allocator's own")
        if name == "max_sparsity" and 0 < Fraction(value).limit_denominator(10**6) < sparsity:
            raise UsageError(
                f"max_sparsity {value:g} is below the sparsity asked for, {float(sparsity):g}"
            )
