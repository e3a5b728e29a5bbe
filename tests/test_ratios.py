"""The arithmetic of layer ratios: whole numbers that add up, water-filling, curves and knapsacks,
OWL's shift.
"""

import itertools
import math
from fractions import Fraction

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from compressor.allocation.sparsity.apportion import apportion, evenly
from compressor.allocation.sparsity.knapsack import best_set, lower_hull, share_out
from compressor.allocation.sparsity.owl import shifted
from compressor.allocation.sparsity.waterfill import waterfill
from compressor.errors import NumericalError, UsageError

SIZES = st.lists(st.integers(1, 5000), min_size=1, max_size=8)
SCORE = st.floats(1e-6, 1e6)


@given(SIZES, st.data())
def test_evenly_is_within_one_and_exact(sizes, data):
    total = data.draw(st.integers(0, sum(sizes)))
    counts = evenly(total, sizes)
    assert sum(counts) == total
    assert all(
        abs(Fraction(count) - Fraction(total * size, sum(sizes))) < 1
        for count, size in zip(counts, sizes, strict=True)
    )


def test_apportion_rounds_up_the_largest_remainders():
    assert apportion(4, [Fraction(5, 10), Fraction(18, 10), Fraction(17, 10)], [9, 9, 9]) == [
        0,
        2,
        2,
    ]


# --- water-filling


def literal_waterfill(sizes, scores, keep, most):
    """The authors' rounds in real numbers: pour in proportion to the scores, fix what is full, pour
    the rest again.
    """
    floors = [math.ceil(size * (1 - most)) for size in sizes]
    kept, full = [float(floor) for floor in floors], set()
    while keep - sum(kept) > 1e-6:
        open_score = sum(score for index, score in enumerate(scores) if index not in full)
        left = keep - sum(kept)
        for index, score in enumerate(scores):
            if index not in full:
                kept[index] += left * score / open_score
        for index, size in enumerate(sizes):
            if kept[index] >= size:
                kept[index] = float(size)
                full.add(index)
    return kept


@given(SIZES, st.integers(1, 9), st.integers(1, 5), st.data())
def test_waterfill_is_the_rounds_of_the_authors(sizes, tenths, more, data):
    scores = data.draw(st.lists(st.floats(0.01, 100), min_size=len(sizes), max_size=len(sizes)))
    most = min(Fraction(tenths + more, 10), Fraction(1))
    keep = sum(sizes) - sum(sizes) * tenths // 10
    assume(keep >= sum(math.ceil(size * (1 - most)) for size in sizes))
    kept = waterfill(sizes, scores, keep, most)
    assert sum(kept) == keep
    assert all(
        math.ceil(size * (1 - most)) <= count <= size
        for count, size in zip(kept, sizes, strict=True)
    )
    assert kept == pytest.approx(literal_waterfill(sizes, scores, keep, most), abs=1 + 1e-3)


@given(st.lists(SCORE, min_size=2, max_size=8), st.integers(1, 9), st.floats(0.001, 1000))
def test_waterfill_is_monotone_and_does_not_mind_the_scale(scores, tenths, scale):
    sizes, most = [1000] * len(scores), min(Fraction(tenths + 1, 10), Fraction(1))
    keep = sum(sizes) * (10 - tenths) // 10
    kept = waterfill(sizes, scores, keep, most)
    for (first, more), (second, less) in itertools.permutations(zip(scores, kept, strict=True), 2):
        assert first <= second or more >= less
    moved = waterfill(sizes, [score * scale for score in scores], keep, most)
    assert all(abs(was - now) <= 1 for was, now in zip(kept, moved, strict=True))
    order = sorted(range(len(scores)), key=lambda index: scores[index])
    turned = waterfill(sizes, [scores[index] for index in order], keep, most)
    assert all(abs(turned[place] - kept[index]) <= 1 for place, index in enumerate(order))


def test_equal_scores_and_sizes_give_the_sparsity_itself():
    assert waterfill([640] * 5, [0.3] * 5, 5 * 256, Fraction(7, 10)) == [256] * 5
    assert (
        waterfill([640] * 5, [3.0, 1, 1, 1, 9], 5 * 256, Fraction(6, 10)) == [256] * 5
    )  # p_max is p: nothing to share


def test_a_full_group_passes_the_rest_on():
    assert waterfill([100, 100, 100], [1000.0, 1, 2], 150, Fraction(9, 10)) == [100, 20, 30]


@pytest.mark.parametrize("scores", [[math.nan, 1], [math.inf, 1], [-1.0, 1], [0.0, 0.0]])
def test_scores_that_say_nothing_raise(scores):
    with pytest.raises(NumericalError):
        waterfill([100, 100], scores, 100, Fraction(6, 10))


def test_scores_that_say_too_little_raise():
    with pytest.raises(NumericalError, match="all groups with a score are full"):
        waterfill([100, 100], [1.0, 0.0], 150, Fraction(9, 10))


def test_a_largest_sparsity_below_the_sparsity_is_refused():
    with pytest.raises(UsageError, match=r"max_sparsity 0\.4 is below"):
        waterfill([100, 100], [1.0, 1.0], 100, Fraction(4, 10))


# --- OWL


@given(SIZES, st.integers(1, 9), st.data())
def test_shifted_is_exact_and_keeps_the_distances(sizes, tenths, data):
    kept = [Fraction(data.draw(st.integers(0, 16)), 100) for _ in sizes]
    zeros = sum(sizes) * tenths // 10
    counts = shifted(sizes, kept, zeros, Fraction(1))
    assert sum(counts) == zeros
    shares = [Fraction(count, size) for count, size in zip(counts, sizes, strict=True)]
    for one, two in itertools.combinations(range(len(sizes)), 2):
        if all(0 < counts[index] < sizes[index] for index in (one, two)):
            slack = Fraction(1, sizes[one]) + Fraction(1, sizes[two])
            assert abs((shares[one] - shares[two]) - (kept[two] - kept[one])) <= slack


# --- curves and items


CURVE = st.lists(st.floats(0, 10), min_size=1, max_size=3).map(
    lambda steps: [0.0, *itertools.accumulate(steps)]
)


@given(st.lists(CURVE, min_size=1, max_size=4), st.data())
def test_share_out_is_the_best_of_all_plans_on_the_hulls(errors, data):
    curves = {
        f"l{index}": [(2 * step, error) for step, error in enumerate(curve)]
        for index, curve in enumerate(errors)
    }
    zeros = data.draw(st.integers(0, sum(curve[-1][0] for curve in curves.values())))
    found = share_out(curves, zeros)
    assert sum(found.values()) == zeros

    def cost(name, count):
        hull = lower_hull(curves[name])
        for (x, y), (x2, y2) in itertools.pairwise(hull):
            if x <= count <= x2:
                return y + (y2 - y) * (count - x) / (x2 - x)
        return hull[0][1]

    plans = itertools.product(*(range(curve[-1][0] + 1) for curve in curves.values()))
    best = min(sum(map(cost, curves, plan)) for plan in plans if sum(plan) == zeros)
    assert sum(cost(name, count) for name, count in found.items()) <= best + 1e-9


def test_share_out_says_when_the_total_cannot_be_reached():
    with pytest.raises(UsageError, match="can take 0 to 10: raise max_sparsity"):
        share_out({"l": [(0, 0.0), (10, 1.0)]}, 11)
    with pytest.raises(NumericalError, match="not finite"):
        share_out({"l": [(0, 0.0), (10, math.nan)]}, 5)


@given(
    st.lists(st.tuples(st.floats(0, 10), st.integers(1, 30)), min_size=1, max_size=7),
    st.integers(1, 100),
)
def test_best_set_is_the_best_of_all_sets(items, budget):
    values = {f"l{index}": value for index, (value, _) in enumerate(items)}
    sizes = {f"l{index}": size for index, (_, size) in enumerate(items)}
    chosen = best_set(values, sizes, budget)
    assert sum(sizes[name] for name in chosen) <= budget
    sets = itertools.chain.from_iterable(
        itertools.combinations(values, count) for count in range(len(values) + 1)
    )
    best = max(
        sum(values[name] for name in names)
        for names in sets
        if sum(sizes[name] for name in names) <= budget
    )
    assert sum(values[name] for name in chosen) == pytest.approx(best)


def test_best_set_fits_large_sizes_without_a_common_divisor():
    sizes = {"a": 10_000_019, "b": 10_000_079, "c": 5_000_011}
    chosen = best_set({"a": 1.0, "b": 1.1, "c": 0.7}, sizes, 15_100_000)
    assert chosen == {"b", "c"}
