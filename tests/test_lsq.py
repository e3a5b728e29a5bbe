from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.refine.lsq import refine
from compressor.stats import InputStats
from tests.refine_problems import case, errors


def literal(weight, pruned, stats, damping):
    """One factorisation a row: x_K = (w H)_K [H_KK]⁻¹ in float64."""
    gram = stats.gram.double()
    damped = gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    out = torch.zeros_like(weight, dtype=torch.float64)
    for r in range(len(weight)):
        kept = (pruned[r] != 0).nonzero()[:, 0]
        target = weight[r].double() @ damped
        out[r, kept] = torch.linalg.solve(damped[kept][:, kept], target[kept])
    return out


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "50%", "70%"])
@pytest.mark.parametrize("tokens", [40, 1000])
def test_equals_a_factorisation_of_every_row(pattern, tokens):
    weight, pruned, stats, parsed = case(0, 24, 96, tokens, pattern)
    refined = refine(weight, pruned, stats, parsed, iterations=300, damping=0.01)
    torch.testing.assert_close(
        refined.double(), literal(weight, pruned, stats, 0.01), rtol=1e-3, atol=1e-3
    )


def test_sixty_iterations_come_within_a_percent_of_the_minimum():
    weight, pruned, stats, pattern = case(1, 64, 256, 4000, "2:4")
    reached = errors(weight, refine(weight, pruned, stats, pattern), stats).sum()
    least = errors(weight, literal(weight, pruned, stats, 0.01), stats).sum()
    start = errors(weight, pruned, stats).sum()
    assert least < 0.6 * start
    assert reached < least + 0.01 * (start - least)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 9),
    groups=st.integers(1, 20),
    tokens=st.integers(1, 200),
    pattern=st.sampled_from(["2:4", "1:4", "50%", "90%"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    damping=st.sampled_from([0.0, 1e-3, 1e-2, 1.0]),
    dead=st.integers(0, 5),
)
def test_never_raises_the_output_error_of_a_row_and_keeps_the_zeros(
    seed, rows, groups, tokens, pattern, dtype, damping, dead
):
    weight, pruned, stats, parsed = case(
        seed, rows, groups * 4, tokens, pattern, dtype, dead=min(dead, groups)
    )
    refined = refine(weight, pruned, stats, parsed, iterations=20, damping=damping)
    assert refined.dtype == dtype
    assert bool(torch.isfinite(refined).all())
    assert bool((refined[pruned == 0] == 0).all())
    slack = 1e-5 * errors(weight, torch.zeros_like(weight), stats)  # of the float32 comparison
    assert bool((errors(weight, refined, stats) <= errors(weight, pruned, stats) + slack).all())


def test_more_iterations_are_never_worse():
    weight, pruned, stats, pattern = case(2, 32, 128, 2000, "2:4")
    totals = [
        errors(weight, refine(weight, pruned, stats, pattern, iterations=i, damping=0.0), stats)
        for i in (0, 1, 2, 4, 8, 16)
    ]
    assert torch.equal(totals[0], errors(weight, pruned, stats))
    for before, after in pairwise(totals):
        assert bool((after <= before * (1 + 1e-5)).all())
    assert bool((totals[-1] < 0.7 * totals[0]).all())


def test_a_weight_that_lost_nothing_is_left_alone():
    weight, _, stats, pattern = case(3, 8, 32, 100, "50%")
    assert torch.equal(refine(weight, weight, stats, pattern), weight)


def test_dead_columns_and_empty_rows_stay_finite_without_damping():
    weight, pruned, stats, pattern = case(4, 8, 32, 100, "2:4", dead=8)
    pruned[3] = 0
    refined = refine(weight, pruned, stats, pattern, damping=0.0)
    assert bool(torch.isfinite(refined).all())
    assert not refined[3].any()


def test_refuses_statistics_without_a_gram_matrix():
    weight, pruned, _, pattern = case(5, 4, 16, 50, "2:4")
    with pytest.raises(ValueError, match="Gram"):
        refine(weight, pruned, InputStats(16), pattern)
