"""Pivots against a literal elimination, and the form they give against the product it stores."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.formats.pivot import Pivot
from compressor.methods.pivots import by_pivots, independent_rows
from compressor_kernels import reference
from compressor_kernels.pivot import check_pivots, pivot, row_order
from compressor_kernels.pivot_linear import PivotLinear


def product(seed, rows, rank, columns, true_rank=None):
    """A [rows, rank] of `true_rank`, its columns of very different sizes, and V [rank, columns]."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    inner = rank if true_rank is None else true_rank
    left = random(rows, inner) @ random(inner, rank) * torch.logspace(0, -3, rank).double()
    return left, random(rank, columns)


def literal_pivots(left):
    """Gram-Schmidt: of the rows that are left, the longest, and what is along it is taken from
    all.
    """
    rest, taken = left.clone(), []
    for _ in range(left.shape[1]):
        row = int(rest.norm(dim=1).argmax())
        if rest[row].norm() <= 1e-9 * left.norm(dim=1).max():
            break
        direction = rest[row] / rest[row].norm()
        rest = rest - torch.outer(rest @ direction, direction)
        rest[row] = 0
        taken.append(row)
    return taken


sizes = st.tuples(st.integers(1, 30), st.integers(1, 30), st.integers(1, 30)).map(
    lambda one: (one[0], min(one), one[1])
)


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10_000), size=sizes)
def test_rows_are_those_of_the_literal_elimination(seed, size):
    left, _ = product(seed, *size)
    taken, basis = independent_rows(left)
    assert taken.tolist() == literal_pivots(left)
    same = basis.T @ basis
    torch.testing.assert_close(same, torch.eye(len(same), dtype=torch.float64), rtol=0, atol=1e-12)
    assert not (left[taken] @ basis).triu(1).abs().max() > 1e-10 * left.abs().max()


@settings(deadline=None, max_examples=60)
@given(seed=st.integers(0, 10_000), size=sizes, missing=st.integers(0, 8))
def test_the_form_is_the_product_whatever_its_rank(seed, size, missing):
    rows, rank, columns = size
    left, right = product(seed, rows, rank, columns, max(rank - missing, 0) if missing else None)
    form = by_pivots(left, right, torch.float64)
    expected = left @ right
    assert form.v.shape == (rank, columns)
    assert form.c.shape == (rows - rank, rank)
    assert form.pivots.dtype == torch.int32
    check_pivots(form.pivots, rows)
    scale = float(expected.abs().max())
    torch.testing.assert_close(form.dense(), expected, rtol=1e-7, atol=1e-9 * max(scale, 1e-30))
    again = Pivot.unpack(form.entry, form.pack())
    assert torch.equal(again.dense(), form.dense())
    form.check_entry(form.entry, (rows, columns))


def test_rows_combine_the_pivots_with_small_numbers():
    """Steeply falling singular values, many rows: what a plain choice of rows makes large."""
    left, right = product(3, 300, 100, 80)
    form = by_pivots(left, right, torch.float64)
    first = torch.linalg.solve(left[:100].T, left[100:].T).T
    assert form.c.abs().max() < min(3, first.abs().max() / 6)


def test_lengths_are_measured_anew_where_nearly_all_of_them_was_taken():
    left, _ = product(5, 40, 20, 1)
    left = left * torch.logspace(0, -9, 20, dtype=torch.float64)
    expected = literal_pivots(left)
    taken, _ = independent_rows(left)
    assert taken.tolist()[: len(expected)] == expected
    assert len(expected) > 12


def test_rounding_is_of_the_numbers_that_are_stored():
    left, right = product(7, 24, 6, 16)
    wide, form = (by_pivots(left, right, dtype) for dtype in (torch.float64, torch.bfloat16))
    for part in ("v", "c"):
        assert torch.equal(getattr(form, part), getattr(wide, part).bfloat16())
    assert torch.equal(form.pivots, wide.pivots)


def test_the_order_of_rows_is_a_permutation_even_of_damaged_pivots():
    assert row_order(torch.tensor([1, 3], dtype=torch.int32), 5).tolist() == [1, 3, 0, 2, 4]
    for damaged in ([3, 1], [2, 2]):
        pivots = torch.tensor(damaged, dtype=torch.int32)
        assert sorted(row_order(pivots, 5).tolist()) == list(range(5))
        with pytest.raises(ValueError, match="pivot 1 is"):
            check_pivots(pivots, 5)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(13,), (4, 13), (2, 3, 13), (0, 13)])
def test_the_product_is_that_of_the_dense_weight(bias, shape):
    left, right = product(11, 9, 4, 13)
    form = by_pivots(left, right, torch.float64)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64)
    b = torch.randn(9, generator=generator, dtype=torch.float64) if bias else None
    expected = torch.nn.functional.linear(x, left @ right, b)
    rows = row_order(form.pivots, 9)
    torch.testing.assert_close(reference.pivot(x, form.v, form.c, rows, b), expected)
    torch.testing.assert_close(pivot(x, form.v, form.c, rows, b), expected)
    module = PivotLinear(13, 9, rank=4, bias=bias, dtype=torch.float64)
    module.load_state_dict({**form.pack(), **({} if b is None else {"bias": b})})
    for prepared in (False, True):
        torch.testing.assert_close(module(x), expected)
        torch.testing.assert_close(module.weight, left @ right)
        assert (module.rows is not None) == prepared
        module.prepare_()


def test_other_pivots_that_are_loaded_order_the_rows_anew_and_damaged_ones_are_refused():
    forms = [by_pivots(*product(seed, 9, 4, 13), torch.float64) for seed in (1, 2)]
    assert not torch.equal(forms[0].pivots, forms[1].pivots)
    module = PivotLinear(13, 9, rank=4, bias=False, dtype=torch.float64)
    module.load_state_dict(forms[0].pack())
    module.prepare_()
    x = torch.randn(3, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(module(x), x @ forms[0].dense().T)
    damaged = {**forms[1].pack(), "weight_pivots": forms[1].pivots.flip(0)}
    with pytest.raises(RuntimeError, match="the weight is damaged: pivot"):
        module.load_state_dict(damaged)
    torch.testing.assert_close(module(x), x @ forms[0].dense().T)
    module.load_state_dict(forms[1].pack(), assign=True)
    torch.testing.assert_close(module(x), x @ forms[1].dense().T)
    fresh = PivotLinear(13, 9, rank=4, bias=False, dtype=torch.float64)
    fresh.load_state_dict(damaged)
    with pytest.raises(ValueError, match="pivot"):
        fresh.prepare_()


def test_what_is_stored_trains():
    form = by_pivots(*product(1, 9, 4, 13), torch.float64)
    module = PivotLinear(13, 9, rank=4, bias=True, dtype=torch.float64)
    module.load_state_dict({**form.pack(), "bias": torch.zeros(9, dtype=torch.float64)})
    module.requires_grad_(True)
    x = torch.randn(3, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    module(x).square().sum().backward()
    weight = form.dense().requires_grad_()
    (x @ weight.T).square().sum().backward()
    slope = weight.grad
    rows = row_order(form.pivots, 9)
    at_pivots, at_rest = slope[rows[:4]], slope[rows[4:]]
    torch.testing.assert_close(module.weight_c.grad, at_rest @ form.v.T)
    torch.testing.assert_close(module.weight_v.grad, at_pivots + form.c.T @ at_rest)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"c": torch.zeros(5, 3)}, "not of one weight"),
        ({"c": torch.zeros(5, 4).double()}, "not of one weight"),
        ({"rows": torch.arange(8)}, "not int64 .9."),
        ({"rows": torch.arange(9).int()}, "not int64 .9."),
        ({"x": torch.zeros(2, 12)}, "x is"),
        ({"bias": torch.zeros(8)}, "bias is"),
    ],
)
def test_what_does_not_fit_is_refused(change, words):
    fits = {
        "x": torch.zeros(2, 13),
        "v": torch.zeros(4, 13),
        "c": torch.zeros(5, 4),
        "rows": torch.arange(9),
    }
    assert pivot(**fits).shape == (2, 9)
    with pytest.raises(ValueError, match=words):
        pivot(**{**fits, **change})
