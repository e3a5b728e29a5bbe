"""NoWag-P against its formula, written out as in the paper."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.methods import magnitude, nowag
from compressor.pattern import Pattern
from compressor.stats import InputStats, output_error


def layer(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, InputStats]:
    """A weight and the statistics of inputs whose scales differ by column."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(512, columns, generator=g) * torch.exp(torch.randn(columns, generator=g))
    stats = InputStats(columns)
    stats.update(x)
    return torch.randn(rows, columns, generator=g) * torch.exp(
        torch.randn(rows, 1, generator=g)
    ), stats


def literal_mask(weight: torch.Tensor, stats: InputStats, n: int, m: int) -> torch.Tensor:
    """Normalise columns, then rows; score by the square times h; keep n of m: one group at a time,
    in float64.
    """
    W = weight.double()
    c = torch.stack([W[:, j].norm() + 1e-5 for j in range(W.shape[1])])
    r = torch.stack([(W[i] / c).norm() + 1e-5 for i in range(W.shape[0])])
    importance = (W / r[:, None] / c[None, :]) ** 2 * stats.norm.double() ** 2
    mask = torch.zeros_like(W, dtype=torch.bool)
    for i in range(W.shape[0]):
        for j in range(0, W.shape[1], m):
            kept = sorted(range(m), key=lambda k: importance[i, j + k].item())[m - n :]
            mask[i, [j + k for k in kept]] = True
    return mask


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), pattern=st.sampled_from(["2:4", "1:4", "4:8", "3:4", "1:2"]))
def test_mask_is_the_formulas(seed: int, pattern: str) -> None:
    weight, stats = layer(6, 16, seed)
    p = Pattern.parse(pattern)
    result = nowag.compress(weight, stats, p).weight
    assert torch.equal(result, weight * literal_mask(weight, stats, p.n, p.m))


def test_unstructured_compares_within_a_row() -> None:
    weight, stats = layer(8, 40)
    result = nowag.compress(weight, stats, Pattern.parse("50%")).weight
    assert torch.equal(result, weight * literal_mask(weight, stats, 20, 40))


def test_differs_from_wanda_by_the_column_norm() -> None:
    weight = torch.tensor([[3.0, 1.0, 1.0, 0.5], [9.0, 0.1, 0.1, 0.5]])
    stats = InputStats(4)
    stats.update(torch.ones(3, 4))
    kept = nowag.compress(weight, stats, Pattern.parse("2:4")).weight != 0
    assert kept[0].tolist() == [
        False,
        True,
        True,
        False,
    ]  # 3 is the largest of its row, but small in its column


def test_normaliser_gives_unit_rows_and_its_loss_is_the_paper_s() -> None:
    weight, stats = layer(12, 20)
    rows, columns = nowag.norms(weight.double())
    assert torch.allclose((weight / rows / columns).norm(dim=1), torch.ones(12).double(), atol=1e-4)
    compressed = nowag.compress(weight, stats, Pattern.parse("2:4")).weight
    h = stats.norm.double().square()
    difference = (weight - compressed).double()
    expected = 0.0
    for i, j in itertools.product(range(12), range(20)):
        expected += (difference[i, j] / (rows[i, 0] * columns[j])).item() ** 2 * h[j].item()
    assert nowag.normalised_loss(weight.double(), compressed.double(), h).item() == pytest.approx(
        expected, rel=1e-9
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_keeps_dtype_values_and_is_idempotent(dtype: torch.dtype) -> None:
    weight, stats = layer(8, 16)
    p = Pattern.parse("2:4")
    once = nowag.compress(weight.to(dtype), stats, p).weight
    assert once.dtype == dtype
    assert p.is_legal(once)
    assert torch.equal(once[once != 0], weight.to(dtype)[once != 0])
    assert torch.equal(nowag.compress(once, stats, p).weight, once)


def test_beats_magnitude_where_inputs_differ() -> None:
    weight, stats = layer(32, 64)
    p = Pattern.parse("2:4")
    ours, plain = (
        output_error(weight, m.compress(weight, stats, p).weight, stats) for m in (nowag, magnitude)
    )
    assert ours < 0.7 * plain


def test_zero_rows_columns_and_dead_channels() -> None:
    weight, stats = layer(8, 16)
    weight[3], weight[:, 5] = 0, 0
    stats.squares[7] = 0
    p = Pattern.parse("2:4")
    result = nowag.compress(weight, stats, p).weight
    assert torch.isfinite(result).all()
    assert p.is_legal(result)
    assert (result[:, 7] == 0).all()  # nothing flows through a dead channel: it is pruned first
