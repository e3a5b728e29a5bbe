"""ARMOR: every step against a slow transcription of its definition, the guarantees, and the odd layers."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compressor.errors import NumericalError, UsageError
from compressor.formats import form_class
from compressor.formats.armor import Armor
from compressor.formats.sparse24 import Sparse24
from compressor.methods import armor, armor_full, armor_separable, nowag
from compressor.methods.armor_algebra import (
    PAIRS,
    Factors,
    balance,
    best_pair,
    diagonal_blocks,
    eye_blocks,
    gumbel,
    left,
    pair_inverses,
    pair_mask,
    proximal_solve,
    right,
)
from compressor.pattern import Pattern
from compressor.stats import InputStats, output_error
from compressor_kernels import reference
from compressor_kernels.linear import ArmorLinear

P24 = Pattern.parse("2:4")
FAST = {"iterations": 6, "finish": 2}


def layer(rows: int = 48, columns: int = 64, seed: int = 0, tokens: int = 1024) -> tuple[Tensor, InputStats]:
    """A heavy-tailed weight and the statistics of correlated inputs."""
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=g) * torch.exp(0.5 * torch.randn(rows, columns, generator=g))
    common = torch.randn(tokens, 8, generator=g) @ torch.randn(8, columns, generator=g) / 8**0.5
    x = common + torch.randn(tokens, columns, generator=g)
    stats = InputStats(columns, gram=True)
    stats.update(x * torch.exp(0.5 * torch.randn(columns, generator=g)))
    return weight, stats


def state(rows: int, columns: int, block_a: int, block_b: int, seed: int) -> tuple[Tensor, Tensor, Factors]:
    """A weight, a positive definite Hessian and factors away from the identity, all float64."""
    weight, stats = layer(rows, columns, seed)
    g = torch.Generator().manual_seed(seed + 1)
    gram = stats.gram.double() / stats.tokens + 0.01 * torch.eye(columns).double()
    mask = P24.mask(torch.rand(rows, columns, generator=g))
    a, b = (eye_blocks(n, k, weight) for n, k in ((rows, block_a), (columns, block_b)))
    a, b = (m + 0.3 * torch.randn(m.shape, generator=g) for m in (a, b))
    return weight.double(), gram, Factors(a.double(), (weight * mask).double(), mask, b.double())


def absorbed(weight: Tensor, gram: Tensor, factors: Factors) -> tuple[Tensor, Factors]:
    """The separable problem whose Hessian is the diagonal blocks of `gram`."""
    root = torch.linalg.cholesky(diagonal_blocks(gram, factors.b.shape[1]))
    return right(weight, root), factors._replace(b=factors.b @ root)


def output_loss(weight: Tensor, compressed: Tensor, stats: InputStats) -> float:
    difference = (weight.float() - compressed.float()).double()
    return ((difference @ stats.gram.double()) * difference).sum().item()


def extra(form: Armor) -> int:
    return form.a.numel() + form.b.numel()


# --- the algebra


def test_blocks_multiply_like_the_matrices_they_stand_for() -> None:
    weight, _, f = state(12, 16, 4, 8, 0)
    A, B = torch.block_diag(*f.a), torch.block_diag(*f.b)
    assert torch.allclose(left(f.a, weight), A @ weight)
    assert torch.allclose(right(weight, f.b), weight @ B)
    assert torch.allclose(f.dense(), A @ f.s @ B)
    assert torch.equal(torch.block_diag(*diagonal_blocks(B, 8)), B)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_best_pair_is_the_best_of_six_least_squares(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    root, target, scale = torch.randn(4, 6, generator=g).double(), torch.randn(4, generator=g).double(), 0.7
    gram = root @ root.T
    losses, solutions = [], []
    for pair in itertools.combinations(range(4), 2):
        p = list(pair)
        s = torch.zeros(4).double()
        s[p] = torch.linalg.solve(scale * gram[p][:, p], target[p])
        solutions.append(s)
        losses.append((scale * s @ gram @ s - 2 * target @ s).item())
    values, index = best_pair(target, pair_inverses(gram), torch.tensor(scale).double(), None)
    best = min(range(6), key=losses.__getitem__)
    assert index.item() == best
    assert torch.allclose(values, solutions[best])
    assert pair_mask(index).nonzero().flatten().tolist() == list(PAIRS[best])


def test_best_pair_noise_draws_from_the_boltzmann_distribution() -> None:
    g = torch.Generator().manual_seed(0)
    target = torch.tensor([1.0, 0.8, 0.5, 0.1])
    gains = torch.tensor([target[list(p)].square().sum() for p in PAIRS])
    noise = 0.5 * gumbel((6, 20000), target, g)
    _, index = best_pair(target[:, None].expand(4, 20000), pair_inverses(torch.eye(4))[..., None], torch.ones(1), noise)
    assert torch.allclose(index.bincount(minlength=6) / 20000, (gains / 0.5).softmax(0), atol=0.015)


def test_singular_groups_give_finite_values() -> None:
    for gram in (torch.zeros(4, 4), torch.ones(4, 4), torch.diag(torch.tensor([1.0, 0.0, 0.0, 0.0]))):
        values, _ = best_pair(torch.ones(4), pair_inverses(gram), torch.tensor(1.0), None)
        assert torch.isfinite(values).all()


def test_balance_keeps_the_product() -> None:
    _, _, f = state(16, 16, 4, 8, 3)
    f.a[0, :, 1] = 0  # a zero column and a zero row must not become NaN
    f.b[1, 2] = 0
    g = balance(f)
    assert torch.allclose(g.dense(), f.dense())
    assert torch.allclose(g.a.norm(dim=1)[1:], torch.ones(3, 4).double())


def test_proximal_solve_where_cholesky_fails() -> None:
    g = torch.Generator().manual_seed(0)
    root = torch.randn(4, 4, generator=g)
    good, singular, indefinite = root @ root.T + torch.eye(4), torch.ones(4, 4), torch.diag(torch.tensor([1.0, 1.0, 1.0, -2.0]))
    rhs, current = torch.randn(4, 4, 3, generator=g), torch.randn(4, 4, 3, generator=g)
    solution = proximal_solve(torch.stack([good, singular, indefinite, torch.full((4, 4), torch.nan)]), rhs, current)
    assert torch.allclose(solution[0], torch.linalg.solve(good, rhs[0]), atol=1e-3)
    assert torch.isfinite(solution).all()
    assert torch.equal(solution[2:], current[2:])


# --- the steps: exact, and none of them raises the loss


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), blocks=st.sampled_from([(4, 4), (8, 4), (4, 8), (16, 16), (12, 8)]))
def test_no_step_raises_the_loss_without_annealing(seed: int, blocks: tuple[int, int]) -> None:
    weight, gram, f = state(48, 32, *blocks, seed)
    target, g = absorbed(weight, gram, f)
    weight_gram, generator = weight @ gram, torch.Generator().manual_seed(seed)
    full = [
        lambda f: armor_full.sweep(weight_gram, gram, f, None, generator),
        lambda f: armor_full.solve_values(weight_gram, gram, f, 3),
        lambda f: armor_full.solve_a(weight_gram, gram, f),
        lambda f: armor_full.solve_b(weight_gram, gram, f, 3),
    ]
    separable = [
        lambda f: armor_separable.sweep(target, f, None, generator),
        lambda f: armor_separable.solve_values(target, f),
        lambda f: armor_separable.solve_a(target, f),
        lambda f: armor_separable.solve_b(target, f),
    ]
    for _ in range(3):
        for step in full:
            before, f = armor_full.loss(weight, gram, f), step(f)
            assert armor_full.loss(weight, gram, f) <= before * (1 + 1e-9)
        for step in separable:
            before, g = armor_separable.loss(target, g), step(g)
            assert armor_separable.loss(target, g) <= before * (1 + 1e-9)
    for h in (f, g):
        assert (h.mask.view(-1, 4).sum(1) == 2).all()
        assert (h.s[~h.mask] == 0).all()


def test_full_sweep_is_gauss_seidel_over_groups() -> None:
    weight, gram, f = state(16, 16, 4, 8, 5)
    result = armor_full.sweep(weight @ gram, gram, f, None, torch.Generator().manual_seed(9))
    order = torch.randperm(4, generator=torch.Generator().manual_seed(9)).tolist()
    s = f.s.clone()
    for group, row in itertools.product(order, range(16)):
        columns = range(4 * group, 4 * group + 4)
        best = None
        for pair in itertools.combinations(columns, 2):
            # the loss is a quadratic in the two values: least squares of the weighted residual on the two rank-1 terms
            s[row, list(columns)] = 0
            root = torch.linalg.cholesky(gram)
            residual = ((weight - f._replace(s=s).dense()) @ root).flatten()
            terms = []
            for column in pair:
                unit = torch.zeros_like(s)
                unit[row, column] = 1
                terms.append((f._replace(s=unit).dense() @ root).flatten())
            basis = torch.stack(terms, 1)
            values = torch.linalg.lstsq(basis, residual[:, None]).solution[:, 0]
            loss = (residual - basis @ values).square().sum().item()
            if best is None or loss < best[0]:
                best = (loss, pair, values)
        s[row, list(columns)] = 0
        s[row, list(best[1])] = best[2]
    assert torch.allclose(result.s, s, atol=1e-8)


def test_separable_sweep_with_one_group_per_block_is_exact() -> None:
    weight, gram, f = state(4, 16, 4, 4, 2)
    f = f._replace(a=eye_blocks(4, 4, weight))  # rows do not interact: one sweep is the exact optimum
    target, g = absorbed(weight, gram, f)
    result = armor_separable.sweep(target, g, None, torch.Generator().manual_seed(0))
    for row, group in itertools.product(range(4), range(4)):
        columns, block = slice(4 * group, 4 * group + 4), g.b[group]
        losses = []
        for pair in PAIRS:
            basis, goal = block[list(pair)].T, target[row, columns]
            losses.append((goal - basis @ torch.linalg.lstsq(basis, goal[:, None]).solution[:, 0]).square().sum().item())
        ours = (target[row, columns] - result.s[row, columns] @ block).square().sum().item()
        assert ours == pytest.approx(min(losses), rel=1e-6)


def weighted_lstsq(weight: Tensor, gram: Tensor, basis: list[Tensor]) -> Tensor:
    root = torch.linalg.cholesky(gram)
    columns = torch.stack([(b @ root).flatten() for b in basis], 1)
    return torch.linalg.lstsq(columns, (weight @ root).flatten()[:, None]).solution[:, 0]


@pytest.mark.parametrize("part", ["a", "b", "s"])
def test_full_solves_reach_the_least_squares_solution(part: str) -> None:
    weight, gram, f = state(8, 8, 4, 4, 7)
    tensor = getattr(f, part)
    places = f.mask.nonzero() if part == "s" else torch.ones_like(tensor).nonzero()
    basis = []
    for place in places:
        unit = torch.zeros_like(tensor)
        unit[tuple(place)] = 1
        basis.append(f._replace(**{part: unit}).dense())
    expected = weighted_lstsq(weight, gram, basis)
    solved = {
        "a": lambda: armor_full.solve_a(weight @ gram, gram, f),
        "b": lambda: armor_full.solve_b(weight @ gram, gram, f, 60),
        "s": lambda: armor_full.solve_values(weight @ gram, gram, f, 200),
    }[part]()
    best = f._replace(**{part: torch.zeros_like(tensor).index_put_(tuple(places.T), expected)})
    assert armor_full.loss(weight, gram, solved).item() == pytest.approx(armor_full.loss(weight, gram, best).item(), rel=1e-4)


@pytest.mark.parametrize("part", ["a", "b"])
def test_separable_solves_are_exact(part: str) -> None:
    weight, gram, f = state(8, 8, 4, 4, 8)
    target, g = absorbed(weight, gram, f)
    tensor = getattr(g, part)
    basis = []
    for place in torch.ones_like(tensor).nonzero():
        unit = torch.zeros_like(tensor)
        unit[tuple(place)] = 1
        basis.append(g._replace(**{part: unit}).dense())
    best = g._replace(**{part: weighted_lstsq(target, torch.eye(8).double(), basis).view(tensor.shape)})
    solved = (armor_separable.solve_a if part == "a" else armor_separable.solve_b)(target, g)
    assert armor_separable.loss(target, solved).item() == pytest.approx(armor_separable.loss(target, best).item(), rel=1e-5)


def test_both_optimisers_agree_where_the_hessian_is_block_diagonal() -> None:
    weight, gram, f = state(16, 16, 4, 8, 4)
    gram = torch.block_diag(*diagonal_blocks(gram, 8))
    target, g = absorbed(weight, gram, f)
    assert armor_full.loss(weight, gram, f).item() == pytest.approx(armor_separable.loss(target, g).item())
    by_full, by_separable = armor_full.solve_a(weight @ gram, gram, f), armor_separable.solve_a(target, g)
    assert torch.allclose(by_full.a, by_separable.a, atol=1e-6)


def test_annealing_beats_greedy() -> None:
    weight, stats = layer(96, 96)
    losses = []
    for anneal in (0.0, 2.0):
        options = {"iterations": 30, "proxy": "diagonal", "finish": 0, "block_size": 16, "overhead": 1.0}
        form = armor.compress(weight, stats, P24, **options, anneal=anneal)
        losses.append(nowag.normalised_loss(weight, form.dense(), stats.norm.square()).item())
    assert losses[1] < 0.95 * losses[0]


# --- compress: the guarantee, the stored form, the options


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", [{"proxy": "diagonal", "finish": 0}, {"proxy": "block"}, {"proxy": "full", "finish": 0}])
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
        ours, base = (nowag.normalised_loss(weight.float(), w.float(), stats.norm.square()) for w in (form.dense(), plain))
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
def test_guarantee_holds_for_any_layer(seed: int, rows: int, columns: int, scale: float, dtype: torch.dtype, proxy: str) -> None:
    weight, stats = layer(rows, columns, seed, tokens=32)  # fewer tokens than columns: a singular Gram matrix
    weight = (weight * scale).to(dtype)
    form = armor.compress(weight, stats, P24, proxy=proxy, overhead=0.5, **FAST)
    plain = nowag.compress(weight, stats, P24).weight
    assert torch.isfinite(form.dense()).all()
    assert output_loss(weight, form.dense(), stats) <= output_loss(weight, plain, stats) * (1 + 1e-5)


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
    assert all(torch.equal(x, y) for x, y in zip(first.pack().values(), second.pack().values(), strict=True))
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
    sparse = nowag.compress(weight, stats, P24).weight  # already 2:4: NoWag-P is exact and nothing can beat it
    form = armor.compress(sparse, stats, P24, **FAST)
    assert torch.equal(form.dense(), sparse)


def test_linear_too_small_for_wrappers_is_plain_and_still_better_than_nowag() -> None:
    weight, stats = layer()
    form = armor.compress(weight, stats, P24, **FAST, overhead=0.01)
    assert isinstance(form, Sparse24)
    assert output_loss(weight, form.dense(), stats) < 0.9 * output_loss(weight, nowag.compress(weight, stats, P24).weight, stats)
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
def test_block_sizes(shape: tuple[int, int], block_size: int, overhead: float, expected: tuple[int, int] | None) -> None:
    assert armor.block_sizes(*shape, block_size, overhead) == expected


@pytest.mark.parametrize(
    "options",
    [{"proxy": "no"}, {"iterations": -1}, {"finish": -1}, {"block_size": 2}, {"anneal": -1.0}, {"overhead": -0.1}, {"damp": -1.0}],
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
    assert isinstance(armor.compress(weight, stats, P24, proxy="diagonal", iterations=3, finish=0, overhead=0.3), Armor)
    with pytest.raises(UsageError, match="Gram"):
        armor.compress(weight, stats, P24)


# --- odd layers


@pytest.mark.parametrize("proxy", ["diagonal", "block", "full"])
@pytest.mark.parametrize("odd", ["zero row", "zero column", "dead channel", "zero block", "rank one", "ties", "outlier"])
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
        ours, base = (nowag.normalised_loss(weight.double(), w.double(), h).item() for w in (result, plain))
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
    stats.m2[3] = bad
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


# --- the stored form and the module that runs it


@pytest.fixture(params=[torch.float32, torch.bfloat16])
def form(request: pytest.FixtureRequest) -> Armor:
    weight, stats = layer(24, 32)
    result = armor.compress(weight.to(request.param), stats, P24, **FAST, overhead=1)
    assert isinstance(result, Armor)
    return result


def test_form_round_trips(form: Armor) -> None:
    tensors = form.pack()
    assert sorted(tensors) == ["weight_a", "weight_b", "weight_metadata", "weight_values"]
    again = form_class("armor").unpack({k: v.clone() for k, v in tensors.items()})
    assert all(torch.equal(x, again.pack()[k]) for k, x in tensors.items())
    exact = torch.block_diag(*form.a.double()) @ form.core().double() @ torch.block_diag(*form.b.double())
    assert torch.equal(again.dense(), form.dense())
    assert torch.allclose(form.dense().double(), exact, rtol=2**-8 if form.a.dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_form_refuses_what_does_not_belong_together(form: Armor) -> None:
    tensors = form.pack()
    for change in (
        {"weight_a": form.a[:-1]},
        {"weight_b": form.b[:, :-1]},
        {"weight_a": form.a.double()},
        {"weight_metadata": torch.zeros_like(form.metadata)},
    ):
        with pytest.raises(ValueError, match=r"weight_|metadata"):
            Armor.unpack(tensors | change)


@pytest.mark.parametrize("bias", [True, False])
def test_module_computes_what_the_form_stands_for(form: Armor, bias: bool) -> None:
    dtype = form.a.dtype
    module = ArmorLinear(32, 24, block_a=form.a.shape[1], block_b=form.b.shape[1], bias=bias, dtype=dtype)
    stored = form.pack() | ({"bias": torch.randn(24).to(dtype)} if bias else {})
    module.load_state_dict(stored)
    x = torch.randn(2, 5, 32).to(dtype)
    expected = x.double() @ form.dense().double().T + (stored["bias"].double() if bias else 0)
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    packed = module(x)
    assert packed.shape == (2, 5, 24)
    assert packed.dtype == dtype
    assert (packed.double() - expected).norm() <= tolerance * expected.norm()
    assert torch.equal(packed, reference.armor(x, form.values, form.metadata, form.a, form.b, stored.get("bias")))
    module.unpack_()
    assert module.weight_values is None
    assert (module(x).double() - expected).norm() <= tolerance * expected.norm()
    saved = module.state_dict()
    assert sorted(saved) == sorted(stored)
    assert all(torch.equal(saved[k], stored[k]) for k in stored)


def test_module_refuses_blocks_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match="do not divide"):
        ArmorLinear(32, 24, block_a=16, block_b=16, bias=False, dtype=torch.float32)
