"""Whole numbers that add up: the integers nearest to given shares whose sum is exact (largest
remainders).
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction


def apportion(total: int, shares: Sequence[Fraction], limits: Sequence[int]) -> list[int]:
    """Integers that sum to `total`, each `floor(share)` or one more, never above its limit.

    Args:
        total: what they add up to.
        shares: real numbers, 0 or more, whose sum is `total`.
        limits: the most each may get; no share is larger than its limit.

    Those with the largest fractional parts are rounded up; of equal ones the first.
    """
    assert sum(shares) == total, (sum(shares), total)
    counts = [int(share) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda index: counts[index] - shares[index])
    for index in by_remainder[: total - sum(counts)]:
        counts[index] += 1
    assert all(count <= limit for count, limit in zip(counts, limits, strict=True))
    return counts


def evenly(total: int, sizes: Sequence[int]) -> list[int]:
    """`total` in proportion to `sizes`."""
    whole = sum(sizes)
    return apportion(total, [Fraction(total * size, whole) for size in sizes], sizes)
