"""ARMOR as a method: its guarantees, its options and the odd layers."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.errors import NumericalError, UsageError
from compressor.formats.armor import Armor
from compressor.formats.sparse24 import Sparse24
from compressor.methods import armor, nowag
from compressor.pattern import Pattern
from compressor.stats import InputStats, output_error
from tests.armor_problems import FAST, P24, extra, layer, output_loss


def test_annealing_beats_greedy() -> None:
    weight, stats = layer(96, 96)
    losses = []
    for anneal in (0.0, 2.0):
        options = {
            "iterations": 30,
            "proxy": "diagonal",
            "finish": 0,
            "block_size": 16,
            "overhead": 1.0,
        }
        form = armor.compress(weight, stats, P24, **options, anneal=anneal)
        losses.append(nowag.normalised_loss(weight, form.dense(), stats.norm.square()).item())
    assert losses[1] < 0.95 * losses[0]


# --- compress: the guarantee, the stored form, the options


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "options",
    [{"proxy": "diagonal", "finish": 0}, {"proxy": "block"}, {"proxy": "full", "finish": 0}],
)
def test_never_worse_than_nowag_after_the_cast(dtype: torch.dtype, options: dict) -> None:
    weight, stats = layer()
    weight = weight.to(dtype)
    form = armor.compress(weight, stats, P24, overhead=0.2, **{**FAST, **options})
    plain = nowag.compress(weight, stats, P24).weight
    assert isinstance(form, Armor)
    assert form.dense().dtype == form.a.dtype == form.b.dtype == form.values.dtype == dtype
    assert P24.is_legal(form.core())
    assert extra(form) <= 0.2 * weight.numel()
    if options["proxy"] == "diagonal":
        ours, base = (
            nowag.normalised_loss(weight.float(), w.float(), stats.norm.square())
            for w in (form.dense(), plain)
        )
    else:
        ours, base = (output_loss(weight, w, stats) for w in (form.dense(), plain))
    assert ours < 0.6 * base


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    rows=st.sampled_from([4, 12, 20, 64]),
    columns=st.sampled_from([4, 12, 40, 64]),
    scale=st.sampled_from([1e-6, 1.0, 1e3]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    proxy=st.sampled_from(["diagonal", "block", "full"]),
)
def test_guarantee_holds_for_any_layer(
    seed: int, rows: int, columns: int, scale: float, dtype: torch.dtype, proxy: str
) -> None:
    weight, stats = layer(
        rows, columns, seed, tokens=32
    )  # fewer tokens than columns: a singular Gram matrix
    weight = (weight * scale).to(dtype)
    form = armor.compress(weight, stats, P24, proxy=proxy, overhead=0.5, **FAST)
    plain = nowag.compress(weight, stats, P24).weight
    assert torch.isfinite(form.dense()).all()
    assert output_loss(weight, form.dense(), stats) <= output_loss(weight, plain, stats) * (
        1 + 1e-5
    )


def test_better_objectives_give_smaller_output_errors() -> None:
    weight, stats = layer(64, 64)
    errors = {}
    for proxy, finish in (("diagonal", 0), ("block", 0), ("block", 4)):
        form = armor.compress(weight, stats, P24, iterations=20, proxy=proxy, finish=finish)
        errors[proxy, finish] = output_error(weight, form.dense(), stats)
    errors["nowag"] = output_error(weight, nowag.compress(weight, stats, P24).weight, stats)
    assert errors["block", 4] < errors["block", 0] < errors["diagonal", 0] < errors["nowag"]


def test_seed_decides_and_the_global_generator_is_untouched() -> None:
    weight, stats = layer()
    torch.manual_seed(1)
    before = torch.get_rng_state()
    first = armor.compress(weight, stats, P24, **FAST, seed=3)
    torch.rand(5)
    second = armor.compress(weight, stats, P24, **FAST, seed=3)
    other = armor.compress(weight, stats, P24, **FAST, seed=4)
    assert all(
        torch.equal(x, y)
        for x, y in zip(first.pack().values(), second.pack().values(), strict=True)
    )
    assert not torch.equal(first.dense(), other.dense())
    torch.manual_seed(1)
    armor.compress(weight, stats, P24, **FAST)
    assert torch.equal(torch.get_rng_state(), before)


def test_inputs_are_left_alone() -> None:
    weight, stats = layer()
    copies = weight.clone(), stats.gram.clone()
    armor.compress(weight, stats, P24, **FAST)
    assert torch.equal(weight, copies[0])
    assert torch.equal(stats.gram, copies[1])


def test_nothing_found_gives_nowag() -> None:
    weight, stats = layer()
    sparse = nowag.compress(
        weight, stats, P24
    ).weight  # already 2:4: NoWag-P is exact and nothing can beat it
    form = armor.compress(sparse, stats, P24, **FAST)
    assert torch.equal(form.dense(), sparse)


def test_linear_too_small_for_wrappers_is_plain_and_still_better_than_nowag() -> None:
    weight, stats = layer()
    form = armor.compress(weight, stats, P24, **FAST, overhead=0.01)
    assert isinstance(form, Sparse24)
    assert output_loss(weight, form.dense(), stats) < 0.9 * output_loss(
        weight, nowag.compress(weight, stats, P24).weight, stats
    )
    by_diagonal = armor.compress(weight, stats, P24, proxy="diagonal", finish=0, overhead=0.01)
    assert torch.equal(by_diagonal.dense(), nowag.compress(weight, stats, P24).weight)


@pytest.mark.parametrize(
    ("shape", "block_size", "overhead", "expected"),
    [
        ((4096, 4096), 128, 0.125, (128, 128)),
        ((1024, 4096), 128, 0.125, (128, 64)),
        ((576, 576), 128, 0.5, (96, 96)),
        ((576, 576), 128, 0.125, (32, 32)),
        ((352, 128), 128, 0.125, (4, 32)),
        ((128, 352), 128, 0.125, (32, 4)),
        ((128, 128), 128, 0.125, (8, 8)),
        ((128, 128), 128, 0.0625, (4, 4)),
        ((128, 128), 128, 0.06, None),
        ((172, 64), 128, 1.0, (4, 64)),
        ((7, 64), 128, 1.0, None),
    ],
)
def test_block_sizes(
    shape: tuple[int, int], block_size: int, overhead: float, expected: tuple[int, int] | None
) -> None:
    assert armor.block_sizes(*shape, block_size, overhead) == expected


@pytest.mark.parametrize(
    "options",
    [
        {"proxy": "no"},
        {"iterations": -1},
        {"finish": -1},
        {"block_size": 2},
        {"anneal": -1.0},
        {"overhead": -0.1},
        {"damp": -1.0},
    ],
)
def test_bad_options_are_refused(options: dict) -> None:
    weight, stats = layer()
    with pytest.raises(UsageError, match=next(iter(options))):
        armor.compress(weight, stats, P24, **options)


@pytest.mark.parametrize("pattern", ["4:8", "1:4", "50%"])
def test_other_patterns_are_refused(pattern: str) -> None:
    weight, stats = layer()
    with pytest.raises(UsageError, match="nowag"):
        armor.compress(weight, stats, Pattern.parse(pattern))


def test_gram_is_asked_for_only_where_it_is_used() -> None:
    weight, stats = layer()
    stats.gram = None
    assert isinstance(
        armor.compress(weight, stats, P24, proxy="diagonal", iterations=3, finish=0, overhead=0.3),
        Armor,
    )
    with pytest.raises(UsageError, match="Gram"):
        armor.compress(weight, stats, P24)


# --- odd layers


@pytest.mark.parametrize("proxy", ["diagonal", "block", "full"])
@pytest.mark.parametrize(
    "odd", ["zero row", "zero column", "dead channel", "zero block", "rank one", "ties", "outlier"]
)
def test_odd_layers(odd: str, proxy: str) -> None:
    weight, stats = layer()
    scale = torch.ones(64)
    if odd == "zero row":
        weight[5] = 0
    elif odd == "zero column":
        weight[:, 9] = 0
    elif odd == "dead channel":
        scale[8:12] = 0
    elif odd == "zero block":
        weight[:8] = 0
        weight[:, :8] = 0
    elif odd == "rank one":
        weight = weight[:, :1] @ torch.ones(1, 64)
    elif odd == "ties":
        weight = torch.ones(48, 64)
    elif odd == "outlier":
        scale[3] = 1e4  # h = 1e8
    x = stats.sample * scale
    stats = InputStats(64, gram=True)
    stats.update(x)
    options = {"finish": 0} if proxy == "diagonal" else {"finish": 2}
    form = armor.compress(weight, stats, P24, iterations=8, proxy=proxy, overhead=0.3, **options)
    assert isinstance(form, Armor)
    result, plain = form.dense(), nowag.compress(weight, stats, P24).weight
    assert torch.isfinite(result).all()
    if proxy == "diagonal":
        h = stats.norm.double().square()
        ours, base = (
            nowag.normalised_loss(weight.double(), w.double(), h).item() for w in (result, plain)
        )
        assert ours <= 0.9 * base
    else:
        assert output_loss(weight, result, stats) <= output_loss(weight, plain, stats) * 0.7


def test_all_zero_weight_and_silent_inputs_give_plain_24() -> None:
    weight, stats = layer()
    form = armor.compress(torch.zeros_like(weight), stats, P24)
    assert isinstance(form, Sparse24)
    assert (form.dense() == 0).all()
    silent = InputStats(64, gram=True)
    silent.update(torch.zeros(10, 64))
    form = armor.compress(weight, silent, P24)
    assert isinstance(form, Sparse24)
    assert torch.isfinite(form.dense()).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_not_finite_is_refused(bad: float) -> None:
    weight, stats = layer()
    weight[3, 4] = bad
    with pytest.raises(NumericalError, match="weight"):
        armor.compress(weight, stats, P24)
    weight, stats = layer()
    stats.squares[3] = bad
    with pytest.raises(NumericalError, match="inputs"):
        armor.compress(weight, stats, P24)
    weight, stats = layer()
    stats.gram[3, 3] = bad
    with pytest.raises(NumericalError, match="Gram"):
        armor.compress(weight, stats, P24)


def test_float16_overflow_falls_back_to_nowag() -> None:
    weight, stats = layer()
    weight = (weight / weight.abs().max() * 60000).half()  # the core of a rotated basis overflows
    form = armor.compress(weight, stats, P24, **FAST)
    assert torch.isfinite(form.dense()).all()
