from itertools import combinations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.errors import UsageError
from compressor.pattern import Pattern
from compressor.refine import lsq
from compressor.refine.quadratic import Quadratic
from compressor.refine.swap import Selectors, refine, sweep
from tests.refine_problems import case


def damped(stats, damping=0.01):
    gram = stats.gram.double()
    return gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)


def errors(weight, pruned, gram):
    difference = weight.double() - pruned.double()
    return torch.linalg.vecdot(difference @ gram.double(), difference)


def literal_sweep(weight, current, gram, n, m):
    """Every row, every group, every mask by itself: solve for its values, keep the one with the
    least error of the row.
    """
    current = current.double().clone()
    for r in range(len(weight)):
        for first in range(0, weight.shape[1], m):
            best, least = None, None
            for keep in combinations(range(first, first + m), n):
                trial, kept = current[r].clone(), list(keep)
                trial[first : first + m] = 0
                right = ((weight[r].double() - trial) @ gram)[kept]
                trial[kept] = torch.linalg.solve(gram[kept][:, kept], right)
                error = errors(weight[r : r + 1], trial[None], gram)[0]
                if least is None or error < least:
                    best, least = trial, error
            current[r] = best
    return current


@pytest.mark.parametrize(
    ("pattern", "columns"), [("2:4", 32), ("1:4", 24), ("4:8", 16), ("2:4", 136)]
)
def test_a_sweep_equals_trying_every_mask_of_every_group(pattern, columns):
    weight, pruned, stats, parsed = case(0, 2, columns, 400, pattern)
    quadratic = Quadratic(stats, 0.01)
    swept = sweep(quadratic, Selectors(quadratic, parsed), weight, pruned)
    expected = literal_sweep(weight, pruned, damped(stats), parsed.n, parsed.m)
    assert torch.equal(swept != 0, expected != 0)
    torch.testing.assert_close(swept.double(), expected, rtol=1e-3, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 9),
    groups=st.integers(1, 34),
    tokens=st.integers(1, 200),
    pattern=st.sampled_from(["2:4", "1:4", "4:8", "1:2", "3:4"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    damping=st.sampled_from([0.0, 1e-3, 1e-2]),
    dead=st.integers(0, 6),
)
def test_masks_stay_legal_and_no_row_gets_worse(
    seed, rows, groups, tokens, pattern, dtype, damping, dead
):
    parsed = Pattern.parse(pattern)
    weight, pruned, stats, _ = case(
        seed, rows, groups * parsed.m, tokens, pattern, dtype, dead=min(dead, groups)
    )
    refined = refine(weight, pruned, stats, parsed, rounds=2, iterations=10, damping=damping)
    assert refined.dtype == dtype
    assert bool(torch.isfinite(refined).all())
    assert parsed.is_legal(refined)
    slack = 1e-5 * errors(weight, torch.zeros_like(weight), stats.gram)
    assert bool(
        (errors(weight, refined, stats.gram) <= errors(weight, pruned, stats.gram) + slack).all()
    )


def test_every_sweep_lowers_the_damped_error():
    weight, current, stats, pattern = case(1, 32, 256, 2000, "2:4")
    quadratic, gram = Quadratic(stats, 0.01), damped(stats)
    selectors = Selectors(quadratic, pattern)
    for _ in range(4):
        before = errors(weight, current, gram)
        current = sweep(quadratic, selectors, weight, current)
        assert bool((errors(weight, current, gram) <= before * (1 + 1e-5)).all())
        assert errors(weight, current, gram).sum() < before.sum()


def test_beats_the_best_values_of_the_starting_mask():
    weight, pruned, stats, pattern = case(2, 64, 128, 2000, "2:4")
    fixed = errors(weight, lsq.refine(weight, pruned, stats, pattern), stats.gram).sum()
    free = errors(weight, refine(weight, pruned, stats, pattern), stats.gram).sum()
    assert free < 0.9 * fixed


@pytest.mark.parametrize("pattern", ["50%", "8:16"])
def test_refuses_what_cannot_be_searched(pattern):
    weight, pruned, stats, _ = case(3, 4, 32, 50, "2:4")
    with pytest.raises(
        UsageError,
        match=(
            r"`refine='swap'` tries every mask of a group.*(50% has no groups|8:16 has 12870 masks)"
        ),
    ):
        refine(weight, pruned, stats, Pattern.parse(pattern))
