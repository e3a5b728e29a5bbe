import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from compressor.errors import NumericalError
from compressor.stats import InputStats, all_finite, collecting, output_error


def test_moments_of_shifted_inputs_match_float64():
    x = torch.randn(6, 50, 8, generator=torch.Generator().manual_seed(0)) * 0.1 + 100
    stats = InputStats(8, gram=True, moments=True)
    for batch in x.split([1, 2, 3]):
        stats.update(batch)
    flat = x.reshape(-1, 8).double()
    assert stats.tokens == 300
    torch.testing.assert_close(stats.mean, flat.mean(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(stats.m2 / 300, flat.var(0, correction=0), rtol=1e-4, atol=0)
    torch.testing.assert_close(stats.norm.double(), flat.norm(dim=0), rtol=1e-6, atol=0)
    torch.testing.assert_close(stats.gram.double(), flat.T @ flat, rtol=1e-5, atol=0)


@pytest.mark.parametrize("width", [1, 3, 127, 128, 129, 576, 1100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_a_gram_matrix_and_its_mirror_are_the_whole(width, dtype):
    x = torch.randn(2, 64, width, generator=torch.Generator().manual_seed(width)).to(dtype)
    stats, whole = InputStats(width, gram=True), torch.zeros(width, width, dtype=torch.float64)
    assert not bool(stats.gram.any())
    for batch in x:
        stats.update(batch)
        whole += batch.double().T @ batch.double()
        gram = stats.gram  # looked at between two updates
        assert torch.equal(gram, gram.T)
        torch.testing.assert_close(gram.double(), whole, rtol=1e-5, atol=1e-4)


def test_only_what_is_asked_for_is_there():
    stats = InputStats(4)
    stats.update(torch.ones(3, 4))
    assert stats.gram is None
    for moment in ("mean", "m2"):
        with pytest.raises(AssertionError, match="without moments"):
            getattr(stats, moment)
    assert stats.norm.tolist() == pytest.approx([3**0.5] * 4)


def test_half_precision_inputs_do_not_overflow():
    stats = InputStats(1)
    stats.update(torch.full((4, 1), 300.0, dtype=torch.float16))
    assert stats.norm.item() == 600.0


class Block(nn.Module):
    """q and k read the same tensor, o another; `twice` calls a linear a second time."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.o = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.o(self.q(x) + self.k(x))


def test_linears_with_one_input_share_one_statistic():
    block = Block()
    batches = [torch.randn(2, 3, 4) for _ in range(3)]
    with collecting({"q": block.q, "k": block.k, "o": block.o}) as stats:
        for batch in batches:
            block(batch)
    assert stats["q"] is stats["k"]
    assert stats["o"] is not stats["q"]
    torch.testing.assert_close(stats["k"].norm, torch.cat(batches).reshape(-1, 4).norm(dim=0))
    assert stats["q"].tokens == stats["o"].tokens == 18
    block(batches[0])
    assert stats["q"].tokens == 18  # the hooks are gone


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.integers(0, 3)), max_size=40))
def test_each_linear_has_the_statistics_of_what_it_reads(calls):
    """Whoever reads what, and however often: shared statistics are those of every sharer."""
    linears = {name: nn.Linear(2, 2) for name in "abcd"}
    pool = [torch.full((number + 1, 2), 10.0**number) for number in range(4)]
    with collecting(linears, gram=True, moments=True) as stats:
        for name, number in calls:
            linears[name](pool[number])
    read = {name: [pool[number] for who, number in calls if who == name] for name in linears}
    assert stats.keys() == {name for name, tensors in read.items() if tensors}
    for name, own in stats.items():
        exact = InputStats(2, gram=True, moments=True)
        for tensor in read[name]:
            exact.update(tensor)
        assert own.tokens == exact.tokens
        assert all(torch.equal(getattr(own, k), getattr(exact, k)) for k in ("mean", "m2", "gram"))
        assert torch.equal(own.norm, exact.norm)
        assert torch.equal(own.sample, exact.sample)


def test_a_linear_that_is_called_twice_does_not_change_what_the_others_read():
    q, k = nn.Linear(2, 2), nn.Linear(2, 2)
    with collecting({"q": q, "k": k}) as stats:
        for _ in range(3):
            x = torch.ones(5, 2)
            q(x), k(x), k(x.new_zeros(1, 2))
    assert (stats["q"].tokens, stats["k"].tokens) == (15, 18)


def test_nothing_seen_and_not_finite_are_refused_by_name():
    stats = InputStats(2)
    with pytest.raises(NumericalError, match=r"mlp\.up saw no tokens"):
        stats.check("mlp.up")
    stats.update(torch.tensor([[1.0, float("inf")]]))
    with pytest.raises(NumericalError, match=r"mlp\.up are not finite"):
        stats.check("mlp.up")


def test_output_error_is_relative_and_squared():
    stats = InputStats(8)
    stats.update(torch.randn(100, 8))
    weight = torch.randn(4, 8)
    assert output_error(weight, weight, stats) == 0
    assert output_error(weight, torch.zeros_like(weight), stats) == pytest.approx(1)
    assert output_error(weight, weight * 0.9, stats) == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_output_error_in_16_bits_is_that_of_float64(dtype):
    generator = torch.Generator().manual_seed(0)
    x, weight = (torch.randn(rows, 64, generator=generator).to(dtype) for rows in (200, 48))
    stats = InputStats(64)
    stats.update(x)
    for share in (0.5, 1e-2, 1e-4):
        near = (weight + share * torch.randn(48, 64, generator=generator)).to(dtype)
        missed = x.double() @ (weight.double() - near.double()).T
        exact = missed.square().sum() / (x.double() @ weight.double().T).square().sum()
        assert output_error(weight, near, stats) == pytest.approx(exact.item(), rel=1e-2)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_output_error_of_outputs_that_float32_cannot_square(size):
    stats = InputStats(8)
    stats.update(torch.randn(100, 8, generator=torch.Generator().manual_seed(0)))
    weight = size * torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    assert output_error(weight, weight * 0.9, stats) == pytest.approx(0.01, rel=1e-4)


def test_finite():
    assert all_finite(torch.ones(3, dtype=torch.bfloat16))
    for bad in (torch.nan, torch.inf, -torch.inf):
        assert not all_finite(torch.tensor([1.0, bad, 2.0]))
