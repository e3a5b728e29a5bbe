"""ARMOR's optimiser: every step against a slow transcription of its definition."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from compressor.methods import armor_full, armor_separable
from compressor.methods.armor_algebra import (
    PAIRS,
    balance,
    best_pair,
    diagonal_blocks,
    eye_blocks,
    left,
    pair_inverses,
    pair_mask,
    proximal_solve,
    right,
)
from compressor.methods.armor_separable import quadratic
from tests.armor_problems import absorbed, state

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
    values, index = best_pair(target, pair_inverses(gram), torch.tensor(scale).double())
    best = min(range(6), key=losses.__getitem__)
    assert index.item() == best
    assert torch.allclose(values, solutions[best])
    assert pair_mask(index).nonzero().flatten().tolist() == list(PAIRS[best])


def test_best_pair_with_heat_draws_from_the_boltzmann_distribution() -> None:
    g = torch.Generator().manual_seed(0)
    target = torch.tensor([1.0, 0.8, 0.5, 0.1])
    gains = torch.tensor([target[list(p)].square().sum() for p in PAIRS])
    _, index = best_pair(
        target[:, None].expand(4, 20000),
        pair_inverses(torch.eye(4))[..., None],
        torch.ones(1),
        torch.tensor(0.5),
        torch.rand(20000, generator=g),
    )
    assert torch.allclose(index.bincount(minlength=6) / 20000, (gains / 0.5).softmax(0), atol=0.015)


def test_singular_groups_give_finite_values() -> None:
    for gram in (
        torch.zeros(4, 4),
        torch.ones(4, 4),
        torch.diag(torch.tensor([1.0, 0.0, 0.0, 0.0])),
    ):
        values, _ = best_pair(torch.ones(4), pair_inverses(gram), torch.tensor(1.0))
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
    full = [
        lambda f: armor_full.sweep(weight_gram, gram, f, None, generator),
        lambda f: armor_full.solve_values(weight_gram, gram, f, 3),
        lambda f: armor_full.solve_a(weight_gram, gram, f),
        lambda f: armor_full.solve_b(weight_gram, gram, f, 3),
    ]
    separable = [
        lambda f: armor_separable.sweep(quadratic(target, f), f, None, generator),
        lambda f: armor_separable.solve_values(quadratic(target, f), f, 3),
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


def test_full_sweep_is_gauss_seidel_over_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(armor_full, "_ROW_TURNS", 4)  # no two rows of a block share a turn
    weight, gram, f = state(16, 16, 4, 8, 5)
    result = armor_full.sweep(weight @ gram, gram, f, None, torch.Generator().manual_seed(9))
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
    result = armor_separable.sweep(quadratic(target, g), g, None, torch.Generator().manual_seed(0))
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
    solved = {
        "a": lambda: armor_full.solve_a(weight @ gram, gram, f),
        "b": lambda: armor_full.solve_b(weight @ gram, gram, f, 60),
        "s": lambda: armor_full.solve_values(weight @ gram, gram, f, 200),
    }[part]()
    best = f._replace(**{part: torch.zeros_like(tensor).index_put_(tuple(places.T), expected)})
    assert armor_full.loss(weight, gram, solved).item() == pytest.approx(
        armor_full.loss(weight, gram, best).item(), rel=1e-4
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
    assert armor_separable.loss(target, solved).item() == pytest.approx(
        armor_separable.loss(target, best).item(), rel=1e-5
    )


def test_both_optimisers_agree_where_the_hessian_is_block_diagonal() -> None:
    weight, gram, f = state(16, 16, 4, 8, 4)
    gram = torch.block_diag(*diagonal_blocks(gram, 8))
    target, g = absorbed(weight, gram, f)
    assert armor_full.loss(weight, gram, f).item() == pytest.approx(
        armor_separable.loss(target, g).item()
    )
    by_full, by_separable = (
        armor_full.solve_a(weight @ gram, gram, f),
        armor_separable.solve_a(target, g),
    )
    assert torch.allclose(by_full.a, by_separable.a, atol=1e-6)
