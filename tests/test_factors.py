"""Truncation in a metric, against its closed form; ranks against literal transcriptions."""

from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.allocation.rank import (
    Spectrum,
    allocator,
    largest_rank,
    parameters,
    rank_keeping,
    step,
    threshold,
    uniform,
    welore,
)
from compressor.allocation.rank.fisher_factors import kronecker_factors
from compressor.calibration.gradients import Taps
from compressor.engine.factor_store import Factored
from compressor.errors import NumericalError, UsageError
from compressor.formats.lowrank import LowRank
from compressor.formats.pivot import Pivot
from compressor.methods import (
    FACTORIZATIONS,
    asvd,
    factors,
    fisher,
    method_module,
    options_of,
    svd,
    svd_llm,
)
from compressor.methods.factor import root
from compressor.stats import InputStats


def problem(rows, columns, tokens=400):
    """A weight, its inputs with correlated columns of very different sizes, and their
    statistics.
    """
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    weight = torch.randn(rows, columns, generator=generator)
    x = torch.randn(tokens, columns, generator=generator) @ torch.randn(
        columns, columns, generator=generator
    )
    x = x * torch.logspace(-1, 1, columns)
    stats = InputStats(columns, gram=True)
    stats.update(x)
    return weight, x, stats


SHAPES = [(24, 40), (40, 24), (32, 32)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 7, 20])
def test_plain_factors_are_the_truncated_svd(shape, rank):
    weight, _, _ = problem(*shape)
    u, s, vh = torch.linalg.svd(weight.double(), full_matrices=False)
    expected = (u[:, :rank] * s[:rank]) @ vh[:rank]
    torch.testing.assert_close(
        svd.compress(weight, None, rank).dense(), expected.float(), rtol=1e-4, atol=1e-5
    )
    torch.testing.assert_close(svd.spectrum(weight, None), s, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [3, 12])
def test_output_error_is_the_dropped_tail(shape, rank):
    weight, x, stats = problem(*shape)
    found = svd_llm.compress(
        weight, stats, rank, damp=1e-10
    ).dense()  # the damping is part of the metric
    measured = (x.double() @ (weight - found).double().T).square().sum()
    tail = svd_llm.spectrum(weight, stats, damp=1e-10)[rank:].square().sum()
    assert abs(measured / tail - 1) < 1e-4
    blind = (
        (x.double() @ (weight - svd.compress(weight, None, rank).dense()).double().T).square().sum()
    )
    assert measured < blind


@pytest.mark.parametrize("shape", SHAPES)
def test_two_sided_error_is_the_dropped_tail(shape):
    weight, _, stats = problem(*shape)
    g = torch.randn(300, shape[0], generator=torch.Generator().manual_seed(1)) * torch.logspace(
        -1, 1, shape[0]
    )
    gradients = g.T @ g
    factors, values = fisher.decompose(weight, 9, stats.gram, gradients)
    found = weight - factors.form(torch.float32).dense()
    left, right = (
        root(gradients, 1e-3),
        root(stats.gram.double() / stats.gram.double().trace(), 1e-6),
    )
    tail = values[9:].square().sum()
    assert abs((left.T @ found.double() @ right).square().sum() / tail - 1) < 1e-4
    literal = torch.linalg.svd(left.T @ weight.double() @ right)
    cut = (literal.U[:, :9] * literal.S[:9]) @ literal.Vh[:9]
    expected = torch.linalg.inv(left.T) @ cut @ torch.linalg.inv(right)
    torch.testing.assert_close(weight - found, expected.float(), rtol=1e-3, atol=1e-4)


def test_kronecker_factors_are_the_partial_traces_of_the_fisher_information():
    generator = torch.Generator().manual_seed(0)
    x, g = torch.randn(50, 6, generator=generator), torch.randn(50, 4, generator=generator)
    a, b = kronecker_factors(Taps([x[:30], x[30:]], [g[:30], g[30:]]))
    fisher = torch.zeros(4, 6, 4, 6, dtype=torch.float64)
    for inputs, gradient in zip(x.double(), g.double(), strict=True):
        outer = torch.outer(gradient, inputs)
        fisher += torch.einsum("oi,pj->oipj", outer, outer)
    torch.testing.assert_close(a.double(), torch.einsum("oioj->ij", fisher), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(b.double(), torch.einsum("oipi->op", fisher), rtol=1e-4, atol=1e-4)


def test_where_the_fisher_information_is_a_product_the_dropped_tail_is_the_rise_of_the_loss():
    weight, x, _ = problem(24, 40)
    g = torch.randn(7, 24, generator=torch.Generator().manual_seed(1))
    pairs = Taps(
        [x.repeat_interleave(len(g), 0)], [g.repeat(len(x), 1)]
    )  # every input with every gradient
    factors, values = fisher.decompose(
        weight, 5, *kronecker_factors(pairs), damp=1e-10, gradient_damp=1e-10
    )
    change = (factors.form(torch.float32).dense() - weight).double()
    rise = (
        torch.einsum("to,oi,ti->t", pairs.gradients[0].double(), change, pairs.inputs[0].double())
        .square()
        .sum()
    )
    assert abs(rise / values[5:].square().sum() - 1) < 1e-3


def test_factors_of_a_lower_rank_are_the_first_columns(tmp_path):
    weight, _, stats = problem(24, 40)
    factors, values = fisher.decompose(weight, 14, stats.gram, weight @ weight.T)
    lower, _ = fisher.decompose(weight, 6, stats.gram, weight @ weight.T)
    files = Factored(tmp_path)
    files.begin()
    files.keep(0, {"linear": (factors.to(torch.float32), "a note")}, {"linear": values})
    found = files.of("linear", 6, torch.device("cpu"))
    torch.testing.assert_close(found.dense(), (lower.u @ lower.v).float())
    assert found.v.shape == (6, 40)
    assert found.note == "a note"
    again = Factored(tmp_path)
    again.load(files.sums())
    assert torch.equal(again.of("linear", 6, torch.device("cpu")).v, found.v)
    assert torch.equal(again.values["linear"], values)


def test_a_linear_that_no_gradient_reaches_is_refused():
    weight, _, stats = problem(24, 40)
    with pytest.raises(NumericalError, match="no gradient of the loss reaches it"):
        fisher.decompose(weight, 3, 0 * stats.gram, 0 * weight @ weight.T)


def test_asvd_scales_columns_and_alpha_zero_is_plain():
    weight, x, stats = problem(24, 40)
    torch.testing.assert_close(
        asvd.compress(weight, stats, 5, alpha=0.0).dense(), svd.compress(weight, None, 5).dense()
    )
    scale = x.double().square().mean(0).sqrt() ** 0.5
    u, s, vh = torch.linalg.svd(weight.double() * scale, full_matrices=False)
    expected = (u[:, :5] * s[:5]) @ vh[:5] / scale
    torch.testing.assert_close(
        asvd.compress(weight, stats, 5).dense(), expected.float(), rtol=1e-3, atol=1e-4
    )


def test_what_cannot_be_factored_is_refused():
    weight, _, stats = problem(24, 40)
    for rank in (0, 25):
        with pytest.raises(UsageError, match="accepted: 1 to 24"):
            svd.compress(weight, None, rank)
    with pytest.raises(UsageError, match="damp is 0; accepted: above 0"):
        svd_llm.compress(weight, stats, 3, damp=0.0)
    stats.gram.zero_()
    with pytest.raises(NumericalError, match="give more calibration samples"):
        svd_llm.compress(weight, stats, 3)
    with pytest.raises(NumericalError, match="not finite"):
        svd.compress(weight / 0, None, 3)


def test_a_dead_input_and_a_half_precision_weight_are_fine():
    weight, x, _ = problem(24, 40)
    x[:, 3] = 0
    stats = InputStats(40, gram=True)
    stats.update(x)
    found = svd_llm.compress(weight.bfloat16(), stats, 8)
    assert found.c.dtype == found.v.dtype == torch.bfloat16
    assert torch.isfinite(found.dense()).all()
    zero = svd.compress(torch.zeros(8, 12), None, 2)
    assert not zero.dense().any()


def test_the_form_comes_apart_and_together():
    weight = problem(24, 40)[0]
    form = svd.compress(weight, None, 6)
    torch.testing.assert_close(Pivot.product(**form.factors()), form.dense())
    assert Pivot.from_factors(**form.factors()).entry == {"format": "pivot", "rank": 6}
    assert torch.equal(Pivot.unpack(form.entry, form.pack()).dense(), form.dense())
    torch.testing.assert_close(form.v, form.dense()[form.pivots.long()], rtol=0, atol=0)
    other, last = form.pivots.clone(), form.pivots[-1]
    other[-1] = form.pivots[-2]
    for bad, words in (
        ({"weight_v": form.v[:5]}, "not of one rank"),
        ({"weight_c": form.c[:, :5]}, "not of one rank"),
        ({"weight_pivots": form.pivots[:5]}, "not of one rank"),
        ({"weight_c": form.c.double()}, "one floating dtype and int32"),
        ({"weight_pivots": form.pivots.long()}, "one floating dtype and int32"),
        ({"weight_pivots": other}, f"pivot 5 is {other[-1]}, after {other[-1]}"),
        ({"weight_pivots": form.pivots.flip(0)}, f"from {last} to {form.pivots[0]}|after {last}"),
        ({"weight_pivots": form.pivots - 24}, "of 24 rows"),
        ({"weight_pivots": form.pivots + 24}, "of 24 rows"),
    ):
        with pytest.raises(ValueError, match=words):
            Pivot.unpack(form.entry, {**form.pack(), **bad})


def test_two_thin_factors_as_they_were_stored_once_can_be_read():
    weight = problem(24, 40)[0]
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    form = LowRank((u[:, :6] * s[:6]).contiguous(), vh[:6].contiguous())
    torch.testing.assert_close(LowRank.product(**form.factors()), form.dense())
    assert LowRank.from_factors(**form.factors()).entry == {"format": "lowrank", "rank": 6}
    assert torch.equal(LowRank.unpack(form.entry, form.pack()).dense(), form.dense())
    for bad in (
        {"weight_u": form.u, "weight_v": form.v[:5]},
        {"weight_u": form.u.double(), "weight_v": form.v},
    ):
        with pytest.raises(ValueError, match="weight_u"):
            LowRank.unpack(form.entry, bad)


def test_every_factorization_has_what_the_pipeline_asks_for():
    for name in FACTORIZATIONS:
        method = method_module(name)
        assert factors(method)
        assert allocator(method.RANKS)
        assert not method.REFINABLE
        assert callable(method.decompose if method.NEEDS_GRADIENTS else method.spectrum)
        assert callable(options_of(method))


def spectra(seed, count=5):
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for number in range(count):
        shape = tuple(int(torch.randint(20, 90, (1,), generator=generator)) for _ in range(2))
        values = (
            torch.rand(min(shape), generator=generator, dtype=torch.float64)
            .pow(-0.7)
            .sort(descending=True)
            .values
        )
        found[f"linear {number}"] = Spectrum(shape, values)
    return found


def total(found):
    return sum(one.size for one in found.values())


def stored(shape, rank, index=0):
    """Numbers of a pivot form: V, C, and `index` for each pivot."""
    rows, columns = shape
    return rank * columns + (rows - rank) * rank + rank * index


@settings(deadline=None, max_examples=200)
@given(rows=st.integers(1, 90), columns=st.integers(1, 90), part=st.fractions(Fraction(1, 100), 1))
def test_the_largest_rank_that_pays_and_that_keeps_a_part(rows, columns, part):
    shape = rows, columns
    pays = [k for k in range(1, min(shape) + 1) if stored(shape, k, index=2) < rows * columns]
    assert largest_rank(shape) == max(pays, default=0)
    within = [k for k in pays if stored(shape, k) <= part * rows * columns]
    found = rank_keeping(shape, part)
    assert found == 0 if not within else found in within
    assert found % step(shape) == 0 or found == max(within)
    assert not within or found > max(within) - step(shape)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), keep=st.floats(0.2, 0.95))
def test_a_budget_is_spent_on_runs_of_ranks_where_the_next_one_alone_would_not_fit_best(seed, keep):
    """One linear gets the largest rank that its parameters pay for; of several, none could be
    raised any more, to whatever rank.
    """
    alone = spectra(seed, count=1)
    (shape,) = [one.shape for one in alone.values()]
    budget = int(keep * total(alone))
    fits = [
        rank
        for rank in range(step(shape), largest_rank(shape) + 1, step(shape))
        if stored(shape, rank) <= budget
    ]
    if fits:
        assert list(threshold.allocate(alone, budget).values()) == [fits[-1]]
    found = spectra(seed)
    budget = int(keep * total(found))
    ranks = threshold.allocate(found, budget)
    for name, rank in ranks.items():
        if rank is not None and rank + step(found[name].shape) <= largest_rank(found[name].shape):
            raised = {**ranks, name: rank + step(found[name].shape)}
            assert parameters(found, raised) > budget


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10_000), keep=st.sampled_from([0.85, 0.6, 0.4]))
def test_no_price_of_a_parameter_gives_ranks_that_drop_less(seed, keep):
    """Every price tried, and every rank of every linear at it."""
    found = spectra(seed, count=3)
    budget = int(keep * total(found))
    dropped = tail(found, threshold.allocate(found, budget))
    for price in torch.logspace(-6, 1, 400, dtype=torch.float64).tolist():
        ranks = {}
        for name, one in found.items():
            options = {None: price * one.size}
            for rank in range(step(one.shape), largest_rank(one.shape) + 1, step(one.shape)):
                rest = float(one.values[rank:].square().sum())
                options[rank] = rest + price * stored(one.shape, rank)
            ranks[name] = min(options, key=lambda rank: options[rank])
        if parameters(found, ranks) <= budget:
            assert dropped <= tail(found, ranks) * (1 + 1e-9)


def literal_welore(found, budget):
    """The paper's rule, thresholds swept one after another; ranks rounded up to the step, then the
    break-even gate.
    """
    cuts = sorted(
        {
            float((v - one.values.min()) / (one.values.max() - one.values.min()))
            for one in found.values()
            for v in one.values
        }
    )
    for cut in cuts:
        ranks, spent = {}, 0
        for name, one in found.items():
            rows, columns = one.shape
            scaled = (one.values - one.values.min()) / (one.values.max() - one.values.min())
            kept = max(1, sum(1 for value in scaled if value >= cut))
            kept = -(-kept // step(one.shape)) * step(one.shape)
            kept = min(kept, min(rows, columns))
            ranks[name] = kept if stored(one.shape, kept, index=2) < rows * columns else None
            spent += rows * columns if ranks[name] is None else stored(one.shape, kept)
        if spent <= budget:
            return ranks
    return None


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10_000), keep=st.sampled_from([0.8, 0.6, 0.5, 0.3]))
def test_welore_ranks_are_those_of_the_literal_rule(seed, keep):
    found = spectra(seed)
    budget = int(keep * total(found))
    expected = literal_welore(found, budget)
    if expected is None:
        with pytest.raises(UsageError, match="raise `keep`"):
            welore.allocate(found, budget, energy=0.0)
    else:
        assert welore.allocate(found, budget, energy=0.0) == expected


def test_welore_guards_the_spike_and_the_constant_spectrum():
    spike = torch.linspace(1, 0.5, 64).double()
    spike[0] = 1e4
    found = {
        "spike": Spectrum((64, 64), spike),
        "plain": Spectrum((64, 64), torch.linspace(1, 0, 64).double()),
    }
    flat = {**found, "flat": Spectrum((64, 64), torch.ones(64).double())}
    assert welore.allocate(flat, int(0.8 * total(flat)))["flat"] is None
    loose = {
        "spike": Spectrum((64, 64), torch.cat([torch.tensor([8.0]), torch.ones(63)]).double()),
        "plain": found["plain"],
    }
    assert welore.allocate(loose, int(0.5 * total(loose)), energy=0.0)["spike"] == step((64, 64))
    assert welore.allocate(loose, int(0.5 * total(loose)), energy=0.6)["spike"] > step((64, 64))


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10_000),
    keep=st.sampled_from([0.9, 0.7, 0.5, 0.3]),
    name=st.sampled_from(["uniform", "threshold"]),
)
def test_ranks_meet_the_budget_and_no_linear_grows(seed, keep, name):
    found = spectra(seed)
    budget = int(keep * total(found))
    ranks = allocator(name).allocate(found, budget)
    assert parameters(found, ranks) <= budget
    for linear, rank in ranks.items():
        if rank is not None:
            assert 1 <= rank <= largest_rank(found[linear].shape)
            assert rank % step(found[linear].shape) == 0
            assert stored(found[linear].shape, rank, index=2) < found[linear].size


def tail(found, ranks):
    return sum(
        0.0 if ranks[name] is None else float(one.values[ranks[name] :].square().sum())
        for name, one in found.items()
    )


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10_000), keep=st.sampled_from([0.8, 0.6, 0.4]))
def test_the_threshold_drops_no_more_than_others_of_its_size(seed, keep):
    found = spectra(seed)
    ranks = threshold.allocate(found, int(keep * total(found)))
    budget = parameters(found, ranks)
    assert tail(found, ranks) <= tail(found, uniform.allocate(found, budget)) * (1 + 1e-9)
