import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compressor.errors import UsageError
from compressor.pattern import Pattern, keep_counts


@pytest.mark.parametrize(
    ("text", "sparsity", "n", "m", "shown"),
    [("2:4", Fraction(1, 2), 2, 4, "2:4"), ("1:4", Fraction(3, 4), 1, 4, "1:4"), (" 4:8 ",
    Fraction(1, 2), 4, 8, "4:8"),
     ("50%", Fraction(1, 2), 0, 0, "50%"), ("0.7", Fraction(7, 10), 0, 0, "70%"), (".25",
     Fraction(1, 4), 0, 0, "25%")],
)  # fmt: skip
def test_parses(text, sparsity, n, m, shown):
    pattern = Pattern.parse(text)
    assert (pattern.sparsity, pattern.n, pattern.m, str(pattern)) == (sparsity, n, m, shown)


@pytest.mark.parametrize(
    "text",
    [
        "abc",
        "4:2",
        "0:4",
        "4:4",
        "1.5",
        "-0.2",
        "150%",
        "0%",
        "100%",
        "",
        "2:4:8",
        "nan",
        "1e-3",
        "2 : 4",
        "٢:٤",
    ],
)
def test_refuses_in_one_line(text):
    with pytest.raises(UsageError) as caught:
        Pattern.parse(text)
    assert "\n" not in str(caught.value)
    assert "accepted" in str(caught.value)


def test_width_names_the_linear():
    with pytest.raises(
        UsageError,
        match=r"in_features 11008 of model\.layers\.0\.mlp\.down_proj is not a multiple of 7",
    ):
        Pattern.parse("3:7").check_width("model.layers.0.mlp.down_proj", 11008)


def literal_mask(score, pattern):
    """Sort (score, column) pairs group by group and drop the smallest: the definition, in plain
    Python.
    """
    mask = []
    for row in score.tolist():
        kept = [True] * len(row)
        size = pattern.m or len(row)
        drop = size - pattern.n if pattern.m else math.floor(len(row) * pattern.sparsity)
        for start in range(0, len(row), size):
            for _, column in sorted((row[column], column) for column in range(start, start + size))[
                :drop
            ]:
                kept[column] = False
        mask.append(kept)
    return torch.tensor(mask)


@given(
    st.sampled_from(["2:4", "1:4", "3:4", "4:8", "1:2", "50%", "29%", "1%", "99%"]),
    st.integers(1, 5), st.integers(1, 4), st.integers(0, 2**31), st.booleans(),
)  # fmt: skip
def test_mask_is_its_definition_with_ties(text, rows, groups, seed, ties):
    pattern = Pattern.parse(text)
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, 8 * groups)
    score = (
        torch.randint(0, 3, shape, generator=generator).float()
        if ties
        else torch.rand(shape, generator=generator)
    )
    assert torch.equal(pattern.mask(score), literal_mask(score, pattern))


def test_whole_matrix_quota():
    pattern = Pattern.parse("60%")
    mask = pattern.mask_matrix(torch.rand(7, 33))
    assert int((~mask).sum()) == math.floor(7 * 33 * pattern.sparsity)


def test_chunks_do_not_change_the_mask(monkeypatch):
    score = torch.rand(50, 16)
    whole = Pattern.parse("2:4").mask(score)
    monkeypatch.setattr("compressor.pattern._CHUNK", 48)
    assert torch.equal(Pattern.parse("2:4").mask(score), whole)


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("2:4", True),
        ("1:4", True),
        ("1:2", True),
        ("2:8", True),
        ("3:4", False),
        ("4:8", False),
        ("1:3", False),
        ("50%", False),
    ],
)
def test_fits_2_4(text, fits):
    assert Pattern.parse(text).fits_2_4 is fits


@given(st.integers(1, 9), st.integers(1, 24), st.integers(0, 2**31), st.booleans(), st.data())
def test_exact_counts(rows, columns, seed, ties, data):
    zeros = data.draw(st.integers(0, rows * columns))
    generator = torch.Generator().manual_seed(seed)
    score = (
        torch.randint(0, 3, (rows, columns), generator=generator).float()
        if ties
        else torch.rand(rows, columns, generator=generator)
    )
    pattern = Pattern.exact(zeros, rows * columns)
    pruned = (~pattern.mask(score)).sum(1)
    assert int(pruned.sum()) == zeros
    assert int(pruned.max() - pruned.min()) <= 1
    expected = torch.cat(
        [
            literal_mask(row[None], Pattern(Fraction(int(count), columns)))
            for row, count in zip(score, pruned, strict=True)
        ]
    )
    assert torch.equal(pattern.mask(score), expected)
    assert torch.equal(keep_counts(score, pruned), expected)
    assert int((~pattern.mask_matrix(score)).sum()) == zeros


@given(st.integers(1, 500), st.integers(1, 40), st.data())
def test_parts_have_the_zeros_of_the_whole(columns, step, data):
    pattern = Pattern.exact(data.draw(st.integers(0, 7 * columns)), 7 * columns)
    parts = [pattern.part(start, start + step, columns) for start in range(0, columns, step)]
    assert sum(part.zeros for part in parts) == pattern.zeros
    sizes = [7 * (min(start + step, columns) - start) for start in range(0, columns, step)]
    assert all(0 <= part.zeros <= size for part, size in zip(parts, sizes, strict=True))
    assert Pattern.parse("50%").part(0, 1, 9) == Pattern.parse("50%")


def test_chunks_keep_an_exact_count(monkeypatch):
    monkeypatch.setattr("compressor.pattern._CHUNK", 48)
    assert int((~Pattern.exact(331, 800).mask(torch.rand(50, 16))).sum()) == 331


@given(st.lists(st.lists(st.integers(-2, 2), min_size=4, max_size=4), min_size=1, max_size=50))
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_two_of_four_by_comparisons_are_those_of_a_sort(dtype, groups):
    """Few values: most groups have ties."""
    score = torch.tensor(groups, dtype=dtype)
    order = score.argsort(dim=-1, stable=True)
    by_sort = torch.ones_like(score, dtype=torch.bool).scatter_(-1, order[:, :2], False)
    assert torch.equal(Pattern.parse("2:4").mask(score.reshape(1, -1)).reshape(-1, 4), by_sort)


def test_two_of_four_by_comparisons_on_many_numbers():
    score = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)).bfloat16()
    order = score.reshape(-1, 4).argsort(dim=-1, stable=True)
    by_sort = torch.ones(len(order), 4, dtype=torch.bool).scatter_(-1, order[:, :2], False)
    assert torch.equal(Pattern.parse("2:4").mask(score).reshape(-1, 4), by_sort)
