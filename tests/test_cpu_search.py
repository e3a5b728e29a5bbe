"""The search of ARMOR in C++ against the one by torch, which is tested by its definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from compressor.methods import armor_separable
from compressor.methods.armor_algebra import Factors, pair_mask
from compressor_kernels.cpu import search
from tests.cpu_problems import here

SIZES = st.sampled_from([4, 8, 12, 16, 32, 48, 128])


def problem(out_blocks, rows, in_blocks, columns, seed):
    """A target and factors in float32."""
    generator = torch.Generator().manual_seed(seed)
    out, features = out_blocks * rows, in_blocks * columns

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    mask = pair_mask(torch.randint(6, (out, features // 4), generator=generator)).view(out, -1)
    a = torch.eye(rows) + 0.3 * random(out_blocks, rows, rows) / rows**0.5
    b = torch.eye(columns) + 0.3 * random(in_blocks, columns, columns) / columns**0.5
    factors = Factors(a, random(out, features) * mask, mask, b)
    return random(out, features), factors, generator


def both(name, form, factors, *others):
    """What C++ and what torch, in float64, make of one state."""
    torchs = getattr(armor_separable, f"_{name}")
    wide = [each.double() for each in (*form, factors.s)]
    rest = [each.double() if torch.is_tensor(each) and each.is_floating_point() else each
            for each in others]  # fmt: skip
    return getattr(search, name)(*form, factors.s, factors.mask, *others), torchs(
        *wide, factors.mask, *rest
    )


@settings(max_examples=40, deadline=None)
@given(
    out_blocks=st.integers(1, 3), rows=SIZES, in_blocks=st.integers(1, 3), columns=SIZES,
    heat=st.sampled_from([None, 0.3, 5.0]), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_a_sweep_takes_the_pairs_that_torch_takes(out_blocks, rows, in_blocks, columns, heat, seed):
    here()
    target, factors, generator = problem(out_blocks, rows, in_blocks, columns, seed)
    form = armor_separable.quadratic(target, factors)
    order = torch.randperm(columns // 4, generator=generator)
    warm = heat is not None
    uniform = torch.rand(columns // 4, in_blocks, len(target), generator=generator)
    ours, torchs = both(
        "sweep", form, factors, order,
        torch.tensor(heat) if warm else None, uniform if warm else None,
    )  # fmt: skip
    # float32 may tip a draw or a tie, and then what comes after it in its row
    same = (ours[1] == torchs[1]).view(len(target), in_blocks, columns).all(2)
    assert same.float().mean() > 0.9
    agreed = same.repeat_interleave(columns, 1)
    assert torch.allclose(ours[0][agreed].double(), torchs[0][agreed], atol=2e-4, rtol=1e-3)
    assert (ours[1].view(-1, 4).sum(1) == 2).all()
    assert (ours[0][~ours[1]] == 0).all()


@settings(max_examples=30, deadline=None)
@given(
    out_blocks=st.integers(1, 3), rows=SIZES, in_blocks=st.integers(1, 3), columns=SIZES,
    steps=st.integers(1, 5), seed=st.integers(0, 10**6),
)  # fmt: skip
def test_values_are_those_of_torch(out_blocks, rows, in_blocks, columns, steps, seed):
    here()
    target, factors, _ = problem(out_blocks, rows, in_blocks, columns, seed)
    ours, torchs = both("solve", armor_separable.quadratic(target, factors), factors, steps)
    assert (ours.double() - torchs).norm() <= 1e-4 * torchs.norm()
    assert (ours[~factors.mask] == 0).all()


def test_a_greedy_sweep_and_a_solve_lower_the_loss():
    here()
    for seed in range(5):
        target, factors, generator = problem(3, 32, 2, 48, seed)
        for _ in range(3):
            before = armor_separable.loss(target, factors)
            form = armor_separable.quadratic(target, factors)
            factors = armor_separable.sweep(form, factors, None, generator)
            between = armor_separable.loss(target, factors)
            factors = armor_separable.solve_values(form, factors)
            assert armor_separable.loss(target, factors) < between < before


def test_threads_change_no_bit():
    here()
    target, factors, generator = problem(5, 32, 3, 32, 0)
    form = armor_separable.quadratic(target, factors)
    order, uniform = torch.randperm(8), torch.rand(8, 3, 160, generator=generator)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            heat = torch.tensor(0.5)
            s, mask = search.sweep(*form, factors.s, factors.mask, order, heat, uniform)
            found.append((s, mask, search.solve(*form, s, mask, 3)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(x, y) for x, y in zip(found[0], other, strict=True))


@pytest.mark.parametrize("b", [torch.zeros(2, 8, 8), torch.ones(2, 8, 8)])
def test_singular_blocks_give_finite_values(b):
    here()
    target, factors, generator = problem(2, 16, 2, 8, 0)
    factors = factors._replace(b=b)
    form = armor_separable.quadratic(target, factors)
    for heat in (None, torch.tensor(1.0)):
        swept = armor_separable.sweep(form, factors, heat, generator)
        assert torch.isfinite(armor_separable.solve_values(form, swept).s).all()


def test_arguments_are_left_alone_and_may_have_any_strides():
    here()
    target, factors, generator = problem(2, 16, 2, 16, 3)
    form = armor_separable.quadratic(target, factors)
    strange = [each.mT.contiguous().mT for each in (*form, factors.s, factors.mask)]
    kept = [each.clone() for each in strange]
    order, uniform = torch.randperm(4), torch.rand(32, 2, 4, generator=generator).permute(2, 1, 0)
    heat = torch.tensor(0.5)
    ours = search.sweep(*strange, order, heat, uniform)
    plain = search.sweep(*form, factors.s, factors.mask, order, heat, uniform.contiguous())
    assert all(torch.equal(x, y) for x, y in zip(ours, plain, strict=True))
    assert torch.equal(search.solve(*strange, 2), search.solve(*form, factors.s, factors.mask, 2))
    assert all(torch.equal(x, y) for x, y in zip(strange, kept, strict=True))


def test_only_float32_on_a_cpu_with_a_library(monkeypatch):
    assert not search.runs(torch.zeros(1, dtype=torch.float64))
    assert not search.runs(torch.zeros(1, device="meta"))
    monkeypatch.setattr(search, "_library", lambda: None)
    assert not search.runs(torch.zeros(1))
    target, factors, generator = problem(2, 8, 2, 8, 0)
    found = armor_separable.fit(target, factors, iterations=4, anneal=1, generator=generator)
    assert armor_separable.loss(target, found) < armor_separable.loss(target, factors)
