"""ARMOR's optimiser: every step against a slow transcription of its definition."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compressor.methods import armor_full, armor_separable
from compressor.methods.armor_algebra import (
    PAIRS,
    Factors,
    Gumbels,
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
from tests.armor_problems import absorbed, state


def full_loss(weight: Tensor, gram: Tensor, factors: Factors) -> Tensor:
    return armor_full.State.of(weight, gram, factors).loss


def separable_loss(target: Tensor, factors: Factors) -> Tensor:
    return armor_separable.State.of(target, factors).loss


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
    root, target, scale = (
        torch.randn(4, 6, generator=g).double(),
        torch.randn(4, generator=g).double(),
        0.7,
    )
    gram = root @ root.T
    losses, solutions = [], []
    for pair in itertools.combinations(range(4), 2):
        p = list(pair)
        s = torch.zeros(4).double()
        s[p] = torch.linalg.solve(scale * gram[p][:, p], target[p])
        solutions.append(s)
        losses.append((scale * s @ gram @ s - 2 * target @ s).item())
    values, index = best_pair(target / scale, pair_inverses(gram), None)
    best = min(range(6), key=losses.__getitem__)
    assert index.item() == best
    assert torch.allclose(values, solutions[best])
    assert pair_mask(index).nonzero().flatten().tolist() == list(PAIRS[best])


def test_best_pair_noise_draws_from_the_boltzmann_distribution() -> None:
    g = torch.Generator().manual_seed(0)
    target = torch.tensor([1.0, 0.8, 0.5, 0.1])
    gains = torch.tensor([target[list(p)].square().sum() for p in PAIRS])
    noise = 0.5 * gumbel((6, 20000), target, g)
    _, index = best_pair(
        target[:, None].expand(4, 20000),
        pair_inverses(torch.eye(4))[..., None],
        noise,
    )
    assert torch.allclose(index.bincount(minlength=6) / 20000, (gains / 0.5).softmax(0), atol=0.015)


def test_singular_groups_give_finite_values() -> None:
    for gram in (
        torch.zeros(4, 4),
        torch.ones(4, 4),
        torch.diag(torch.tensor([1.0, 0.0, 0.0, 0.0])),
    ):
        values, _ = best_pair(torch.ones(4), pair_inverses(gram), None)
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
    good, singular, indefinite = (
        root @ root.T + torch.eye(4),
        torch.ones(4, 4),
        torch.diag(torch.tensor([1.0, 1.0, 1.0, -2.0])),
    )
    rhs, current = torch.randn(4, 4, 3, generator=g), torch.randn(4, 4, 3, generator=g)
    solution = proximal_solve(
        torch.stack([good, singular, indefinite, torch.full((4, 4), torch.nan)]), rhs, current
    )
    assert torch.allclose(solution[0], torch.linalg.solve(good, rhs[0]), atol=1e-3)
    assert torch.isfinite(solution).all()
    assert torch.equal(solution[2:], current[2:])


# --- the steps: exact, and none of them raises the loss


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10**6), blocks=st.sampled_from([(4, 4), (8, 4), (4, 8), (16, 16), (12, 8)])
)
def test_no_step_raises_the_loss_without_annealing(seed: int, blocks: tuple[int, int]) -> None:
    weight, gram, f = state(48, 32, *blocks, seed)
    target, g = absorbed(weight, gram, f)
    weight_gram, generator = weight @ gram, torch.Generator().manual_seed(seed)
    noise = Gumbels(6 * weight.numel(), weight, generator)

    def form(f: Factors) -> armor_full.Quadratic:
        return armor_full.quadratic(gram, armor_full.State.of(weight, gram, f))

    def at(f: Factors) -> armor_separable.State:
        return armor_separable.State.of(target, f)

    full = [
        lambda f: armor_full.sweep(form(f), f, None, generator)[0],
        lambda f: armor_full.solve_values(form(f), f, 3),
        lambda f: armor_full.solve_a(weight_gram, gram, f),
        lambda f: armor_full.solve_b(weight_gram, gram, f, 3),
    ]
    separable = [
        lambda f: armor_separable.sweep(at(f), None, noise, generator)[0],
        lambda f: armor_separable.solve_values(armor_separable.quadratic(at(f)), f, 2),
        lambda f: armor_separable.solve_a(target, f),
        lambda f: armor_separable.solve_b(target, f),
    ]
    for _ in range(3):
        for step in full:
            before, f = full_loss(weight, gram, f), step(f)
            assert full_loss(weight, gram, f) <= before * (1 + 1e-9)
        for step in separable:
            before, g = separable_loss(target, g), step(g)
            assert separable_loss(target, g) <= before * (1 + 1e-9)
    for h in (f, g):
        assert (h.mask.view(-1, 4).sum(1) == 2).all()
        assert (h.s[~h.mask] == 0).all()


def test_full_sweep_is_gauss_seidel_over_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, gram, f = state(16, 16, 4, 8, 5)
    monkeypatch.setattr("compressor.methods.armor_full._ROW_TURNS", 4)  # each row its own
    form = armor_full.quadratic(gram, armor_full.State.of(weight, gram, f))
    result, _ = armor_full.sweep(form, f, None, torch.Generator().manual_seed(9))
    order = torch.randperm(4, generator=torch.Generator().manual_seed(9)).tolist()
    s = f.s.clone()
    for group, row in itertools.product(order, range(16)):
        columns = range(4 * group, 4 * group + 4)
        best = None
        for pair in itertools.combinations(columns, 2):
            # the loss is a quadratic in the two values: least squares of the weighted residual on
            # the two rank-1 terms
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
    f = f._replace(
        a=eye_blocks(4, 4, weight)
    )  # rows do not interact: one sweep is the exact optimum
    target, g = absorbed(weight, gram, f)
    start, generator = armor_separable.State.of(target, g), torch.Generator().manual_seed(0)
    result, _ = armor_separable.sweep(start, None, Gumbels(96, target, generator), generator)
    for row, group in itertools.product(range(4), range(4)):
        columns, block = slice(4 * group, 4 * group + 4), g.b[group]
        losses = []
        for pair in PAIRS:
            basis, goal = block[list(pair)].T, target[row, columns]
            losses.append(
                (goal - basis @ torch.linalg.lstsq(basis, goal[:, None]).solution[:, 0])
                .square()
                .sum()
                .item()
            )
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
    form = armor_full.quadratic(gram, armor_full.State.of(weight, gram, f))
    solved = {
        "a": lambda: armor_full.solve_a(weight @ gram, gram, f),
        "b": lambda: armor_full.solve_b(weight @ gram, gram, f, 60),
        "s": lambda: armor_full.solve_values(form, f, 200),
    }[part]()
    best = f._replace(**{part: torch.zeros_like(tensor).index_put_(tuple(places.T), expected)})
    assert full_loss(weight, gram, solved).item() == pytest.approx(
        full_loss(weight, gram, best).item(), rel=1e-4
    )


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
    best = g._replace(
        **{part: weighted_lstsq(target, torch.eye(8).double(), basis).view(tensor.shape)}
    )
    solved = (armor_separable.solve_a if part == "a" else armor_separable.solve_b)(target, g)
    assert separable_loss(target, solved).item() == pytest.approx(
        separable_loss(target, best).item(), rel=1e-5
    )


def test_both_optimisers_agree_where_the_hessian_is_block_diagonal() -> None:
    weight, gram, f = state(16, 16, 4, 8, 4)
    gram = torch.block_diag(*diagonal_blocks(gram, 8))
    target, g = absorbed(weight, gram, f)
    assert full_loss(weight, gram, f).item() == pytest.approx(separable_loss(target, g).item())
    by_full, by_separable = (
        armor_full.solve_a(weight @ gram, gram, f),
        armor_separable.solve_a(target, g),
    )
    assert torch.allclose(by_full.a, by_separable.a, atol=1e-6)


@pytest.mark.parametrize("optimiser", ["full", "separable"])
@pytest.mark.parametrize("greedy", [True, False])
def test_a_sweep_hands_on_the_quadratic_at_its_result(optimiser: str, greedy: bool) -> None:
    weight, gram, f = state(16, 24, 8, 4, 3)
    generator, heat = torch.Generator().manual_seed(2), None if greedy else torch.tensor(0.1)
    if optimiser == "full":
        start = armor_full.State.of(weight, gram, f)
        moved, form = armor_full.sweep(armor_full.quadratic(gram, start), f, heat, generator)
        expected = armor_full.quadratic(gram, armor_full.State.of(weight, gram, moved))
    else:
        target, g = absorbed(weight, gram, f)
        noise = Gumbels(6 * weight.numel(), weight, generator)
        moved, form = armor_separable.sweep(
            armor_separable.State.of(target, g), heat, noise, generator
        )
        expected = armor_separable.quadratic(armor_separable.State.of(target, moved))
    assert not torch.equal(moved.mask, f.mask)
    torch.testing.assert_close(form.error, expected.error)


def test_first_step_of_the_values_is_the_best_along_its_direction() -> None:
    weight, gram, f = state(8, 8, 8, 8, 11)  # one block: one length
    target, g = absorbed(weight, gram, f)
    form = armor_separable.quadratic(armor_separable.State.of(target, g))
    moved = armor_separable.solve_values(form, g, 1)
    way = moved.s - g.s
    steepest = -form.error * g.mask
    steepest /= form.a_gram[0].diagonal()[:, None] * form.b_gram[0].diagonal()
    torch.testing.assert_close(way / way.norm(), steepest / steepest.norm())
    losses = [
        separable_loss(target, g._replace(s=g.s + share * way)).item()
        for share in (0.0, 0.9, 1.0, 1.1)
    ]
    assert losses[2] == min(losses)


def test_values_converge_to_least_squares_under_the_proxy() -> None:
    weight, gram, f = state(8, 8, 4, 4, 7)
    target, g = absorbed(weight, gram, f)
    basis = []
    for place in g.mask.nonzero():
        unit = torch.zeros_like(g.s)
        unit[tuple(place)] = 1
        basis.append(g._replace(s=unit).dense())
    values = weighted_lstsq(target, torch.eye(8).double(), basis)
    best = g._replace(s=torch.zeros_like(g.s).masked_scatter_(g.mask, values))
    form = armor_separable.quadratic(armor_separable.State.of(target, g))
    solved = armor_separable.solve_values(form, g, 200)
    assert separable_loss(target, solved).item() == pytest.approx(
        separable_loss(target, best).item(), rel=1e-6
    )


def test_going_ahead_leaves_the_mask_and_the_zeros() -> None:
    _, _, f = state(16, 16, 4, 8, 12)
    _, _, g = state(16, 16, 4, 8, 13)
    pushed = armor_full.ahead(f, g, 0.5)
    assert torch.equal(pushed.mask, g.mask)
    assert (pushed.s[~g.mask] == 0).all()
    assert torch.allclose(pushed.a, 1.5 * g.a - 0.5 * f.a)
    same = (f.mask == g.mask) & g.mask
    assert torch.allclose(pushed.s[same], (1.5 * g.s - 0.5 * f.s)[same])


def test_noise_from_a_pool_repeats_late_and_is_gumbel() -> None:
    noise = Gumbels(1000, torch.zeros(1), torch.Generator().manual_seed(0))
    reads = [noise.read((1000,)).clone() for _ in range(200)]
    assert not any(torch.equal(reads[0], other) for other in reads[1:])
    drawn = torch.cat(reads)
    assert drawn.mean().item() == pytest.approx(0.577, abs=0.1)
    assert drawn.var().item() == pytest.approx(math.pi**2 / 6, rel=0.15)
