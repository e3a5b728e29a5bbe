import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.errors import NumericalError
from compressor.pattern import Pattern
from compressor.refine import lsq
from compressor.refine.admm import refine
from tests.refine_problems import case, errors


def nearest(row, n, m, quota):
    """The legal row nearest to `row`, one weight after the other."""
    out = [0.0] * len(row)
    groups = [range(g, g + m) for g in range(0, len(row), m)] if m else [range(len(row))]
    for group in groups:
        for j in sorted(group, key=lambda j: abs(row[j]))[-(n if m else quota) :]:
            out[j] = row[j]
    return out


def literal(weight, start, stats, pattern, stages, steps, damping):
    """The three lines of the paper in float64, a linear system solved for every row and
    iteration.
    """
    gram, columns = stats.gram.double(), weight.shape[1]
    damped = gram + damping * gram.diagonal().mean() * torch.eye(columns, dtype=torch.float64)
    d = damped.diagonal().rsqrt()
    H = torch.diag(d) @ damped @ torch.diag(d)
    quota = columns - int(columns * pattern.sparsity)
    out = []
    for w, z in zip(weight.double() / d, start.double() / d, strict=True):
        v, Z = torch.zeros_like(w), z.clone()
        for stage in range(stages):
            rho = 0.1 * 10 ** (stage / (stages - 1))
            for _ in range(steps):
                X = torch.linalg.solve(
                    H + rho * torch.eye(columns, dtype=torch.float64), H @ w - v + rho * Z
                )
                Z = torch.tensor(
                    nearest((X + v / rho).tolist(), pattern.n, pattern.m, quota),
                    dtype=torch.float64,
                )
                v = v + rho * (X - Z)
        out.append(Z * d)
    return torch.stack(out)


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "4:8", "50%", "70%"])
def test_finds_the_masks_of_a_literal_transcription(pattern):
    weight, pruned, stats, parsed = case(0, 6, 48, 400, pattern)
    found = refine(weight, pruned, stats, parsed, stages=4, steps=3, iterations=60)
    expected = literal(weight, pruned, stats, parsed, 4, 3, 0.01)
    assert torch.equal(found != 0, expected != 0)
    assert not torch.equal(found != 0, pruned != 0)
    solved = lsq.refine(weight, expected.float(), stats, parsed)
    torch.testing.assert_close(found, solved, rtol=1e-3, atol=1e-3)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    rows=st.integers(1, 9),
    groups=st.integers(1, 20),
    tokens=st.integers(1, 200),
    pattern=st.sampled_from(["2:4", "1:4", "50%", "90%", "8:16"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    damping=st.sampled_from([0.0, 1e-2]),
    dead=st.integers(0, 5),
)
def test_masks_stay_legal_and_no_row_gets_worse(
    seed, rows, groups, tokens, pattern, dtype, damping, dead
):
    parsed = Pattern.parse(pattern)
    weight, pruned, stats, _ = case(
        seed, rows, groups * (parsed.m or 4), tokens, pattern, dtype, dead=min(dead, groups)
    )
    refined = refine(
        weight, pruned, stats, parsed, stages=3, steps=3, iterations=10, damping=damping
    )
    assert refined.dtype == dtype
    assert bool(torch.isfinite(refined).all())
    assert parsed.is_legal(refined)
    assert bool(((refined != 0).sum(1) <= (pruned != 0).sum(1)).all())
    slack = 1e-5 * errors(weight, torch.zeros_like(weight), stats)
    assert bool((errors(weight, refined, stats) <= errors(weight, pruned, stats) + slack).all())


@pytest.mark.parametrize("pattern", ["2:4", "50%"])
def test_beats_the_best_values_of_the_starting_mask(pattern):
    weight, pruned, stats, parsed = case(1, 64, 128, 2000, pattern)
    fixed = errors(weight, lsq.refine(weight, pruned, stats, parsed), stats).sum()
    free = errors(weight, refine(weight, pruned, stats, parsed), stats).sum()
    assert free < 0.85 * fixed


def test_refuses_a_gram_matrix_that_is_not_finite():
    weight, pruned, stats, pattern = case(2, 4, 16, 50, "2:4")
    stats.gram[2, 3] = stats.gram[3, 2] = torch.nan
    with pytest.raises(NumericalError, match="ADMM"):
        refine(weight, pruned, stats, pattern)
