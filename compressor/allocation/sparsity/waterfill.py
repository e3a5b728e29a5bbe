"""ECoFLaP's allocator (Sung et al. 2024, https://arxiv.org/abs/2310.02998), exact and in integers.

Every group keeps f_g = ⌈N_g (1 - p_max)⌉ of its N_g weights; what is left of the K weights to keep
is poured out in proportion to the scores S_g until a group is full:

    keep_g = min(N_g, f_g + c S_g),  c >= 0 such that Σ keep_g = K

The authors' loop rounds up in every round and ends a little above K; here c is found exactly, in
rational numbers, and the largest remainders are rounded up, so that the sum is K.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

from compressor.allocation.sparsity.apportion import apportion
from compressor.errors import NumericalError, UsageError


def waterfill(
    sizes: Sequence[int], scores: Sequence[float], keep: int, most: Fraction
) -> list[int]:
    """Weights each group keeps, `keep` in all.

    Args:
        sizes: N_g.
        scores: S_g, finite, 0 or more; a group with a higher score keeps no smaller share of equal
            sizes.
        keep: K.
        most: p_max, the largest sparsity of a group.

    Raises:
        NumericalError: a score is not finite or negative, or the groups with a score are full
            before K is reached.
        UsageError: p_max is below the sparsity asked for.
    """
    if not all(math.isfinite(score) and score >= 0 for score in scores):
        raise NumericalError("a score is NaN, infinite or negative: ratios cannot be made from it")
    floors = [math.ceil(size * (1 - most)) for size in sizes]
    poured = keep - sum(floors)
    if poured < 0:
        if sum(size * (1 - most) for size in sizes) > keep:
            raise UsageError(f"max_sparsity {float(most):g} is below the sparsity asked for")
        return apportion(
            keep, [Fraction(keep * size, sum(sizes)) for size in sizes], sizes
        )  # equal but for rounding
    room = [size - floor for size, floor in zip(sizes, floors, strict=True)]
    return [
        floor + more
        for floor, more in zip(
            floors, _pour(poured, room, [Fraction(score) for score in scores]), strict=True
        )
    ]


def _pour(total: int, room: Sequence[int], scores: Sequence[Fraction]) -> list[int]:
    """min(room, c · score), in integers, `total` in all. The group that is full at the smallest c
    is settled first.
    """
    shares = [Fraction(0)] * len(room)
    left, open_score = Fraction(total), sum(scores)
    for index in sorted(
        (i for i in range(len(room)) if scores[i]), key=lambda i: room[i] / scores[i]
    ):
        level = left / open_score
        shares[index] = min(Fraction(room[index]), level * scores[index])
        left -= shares[index]
        open_score -= scores[index]
    if left:
        raise NumericalError(
            "all scores are zero, or all groups with a score are full: ratios cannot be made from "
            "them"
        )
    return apportion(total, shares, room)
