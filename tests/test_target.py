import pytest
import torch

from benchmarks.target import matched
from compressor.errors import NumericalError
from compressor.stats import InputStats


def case(seed=0, tokens=600, columns=24, rows=10):
    generator = torch.Generator().manual_seed(seed)
    dense = torch.randn(tokens, columns, generator=generator) + 0.3
    seen = dense + 0.3 * torch.randn(tokens, columns, generator=generator) + 0.2 * dense.roll(1, 1)
    stats = InputStats(columns, gram=True)
    stats.update(seen)
    return (
        torch.randn(rows, columns, generator=generator),
        dense,
        seen,
        stats,
        seen.T @ (dense - seen),
    )


def test_equals_the_least_squares_weight_of_the_dense_outputs():
    weight, dense, seen, stats, cross = case()
    expected = torch.linalg.lstsq(seen.double(), dense.double() @ weight.double().T).solution.T
    torch.testing.assert_close(
        matched(weight, stats, cross, strength=1, damping=0.0).double(),
        expected,
        rtol=1e-3,
        atol=1e-4,
    )


def test_the_error_against_the_dense_model_differs_by_a_constant():
    weight, dense, seen, stats, cross = case()
    target = matched(weight, stats, cross, strength=1, damping=0.0)
    generator = torch.Generator().manual_seed(1)
    gaps = []
    for _ in range(3):
        other = weight * (torch.rand(weight.shape, generator=generator) < 0.5)
        gaps.append(
            (dense @ weight.T - seen @ other.T).square().sum()
            - (seen @ (target - other).T).square().sum()
        )
    torch.testing.assert_close(gaps[0], gaps[1], rtol=1e-3, atol=0)
    torch.testing.assert_close(gaps[0], gaps[2], rtol=1e-3, atol=0)


def test_nothing_to_correct_and_no_strength_leave_the_weight():
    weight, _, _, stats, cross = case()
    assert torch.equal(matched(weight, stats, torch.zeros_like(cross)), weight)
    assert torch.equal(matched(weight, stats, cross, strength=0.0), weight)
    assert matched(weight.bfloat16(), stats, cross).dtype == torch.bfloat16


def test_a_gram_matrix_without_rank_needs_damping():
    weight, _, _, stats, cross = case(tokens=5)
    assert bool(torch.isfinite(matched(weight, stats, cross)).all())
    stats.gram.zero_()
    with pytest.raises(NumericalError, match="damping"):
        matched(weight, stats, cross, damping=0.0)
