import pytest
import torch
from torch import nn

from compressor.calibration.arguments import Arguments
from compressor.calibration.hidden_states import Batch
from compressor.engine.block_tuning import tune
from compressor.formats.armor import Armor
from compressor.formats.sparse24 import Sparse24
from compressor.methods import armor
from compressor.pattern import Pattern
from compressor.stats import InputStats


class Block(nn.Module):
    """A residual block with a gate: its linears depend on each other."""

    def __init__(self, dim=16, inner=32):
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.gate = nn.Linear(dim, inner, bias=False)
        self.up = nn.Linear(dim, inner, bias=False)
        self.down = nn.Linear(inner, dim, bias=False)

    def forward(self, hidden, scale=None):
        x = self.norm(hidden)
        return (
            hidden
            + self.down(nn.functional.silu(self.gate(x)) * self.up(x))
            * (1 if scale is None else scale),
        )


def case(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    block = Block().to(dtype)
    for parameter in block.parameters():
        parameter.requires_grad_(False)
    hidden = [torch.randn(4, 16, 16, dtype=dtype) for _ in range(8)]
    targets = [block(batch)[0] for batch in hidden]
    pattern = Pattern.parse("2:4")
    forms = {}
    for name in ("gate.weight", "up.weight", "down.weight"):
        weight = block.get_parameter(name)
        forms[name] = Sparse24.from_dense(weight * pattern.mask(weight.float().abs()))
        weight.data.zero_()  # what the block holds is not looked at
    return block, forms, hidden, targets, pattern


def batches(tensors):
    return [Batch(number, hidden) for number, hidden in enumerate(tensors)]


def error(block, forms, hidden, targets):
    for name, form in forms.items():
        block.get_parameter(name).data = form.dense()
    missed = torch.stack(
        [(block(h)[0] - t).float().square().mean() for h, t in zip(hidden, targets, strict=True)]
    ).mean()
    added = torch.stack(
        [(t - h).float().square().mean() for h, t in zip(hidden, targets, strict=True)]
    ).mean()
    return (missed / added).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lowers_the_error_and_keeps_zeros_dtype_and_the_rest(dtype):
    block, forms, hidden, targets, pattern = case(dtype)
    was = {name: parameter.clone() for name, parameter in block.named_parameters()}
    tuned, before, after = tune(block, forms, batches(hidden), batches(targets), epochs=20)
    assert after < 0.7 * before
    for name, parameter in block.named_parameters():
        assert torch.equal(parameter, was[name])
        assert parameter.dtype == dtype
        assert not parameter.requires_grad
    for name, form in tuned.items():
        weight = form.dense()
        assert isinstance(form, Sparse24)
        assert weight.dtype == dtype
        assert pattern.is_legal(weight)
        assert not bool(weight[forms[name].dense() == 0].any())
    assert error(block, tuned, hidden, targets) == pytest.approx(after, rel=1e-3)
    assert error(block, forms, hidden, targets) == pytest.approx(before, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_trains_the_factors_of_a_product(dtype):
    block, forms, hidden, targets, pattern = case(dtype)
    whole = {name: form.dense() for name, form in forms.items()}
    for name in whole:
        stats = InputStats(whole[name].shape[1], gram=True)
        stats.update(torch.randn(64, whole[name].shape[1]))
        forms[name] = armor.compress(
            whole[name] + 0.1, stats, pattern, overhead=0.6, iterations=2, finish=1
        )
    assert all(isinstance(form, Armor) for form in forms.values())
    tuned, before, after = tune(block, forms, batches(hidden), batches(targets), epochs=20)
    assert after < 0.7 * before
    for name, form in tuned.items():
        assert form.entry == forms[name].entry
        assert form.values.dtype == form.a.dtype == form.b.dtype == dtype
        assert pattern.is_legal(form.core())
        assert not bool(form.core()[forms[name].core() == 0].any())
        for part in ("a", "b", "values"):
            assert not torch.equal(getattr(form, part), getattr(forms[name], part))
    assert error(block, tuned, hidden, targets) == pytest.approx(after, rel=1e-3)


def test_is_deterministic_and_leaves_the_global_generator_alone():
    results = []
    for _ in range(2):
        block, forms, hidden, targets, _ = case()
        state = torch.get_rng_state()
        results.append(
            tune(block, forms, batches(hidden), batches(targets), epochs=2)[0]["down.weight"].values
        )
        assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(*results)


@pytest.mark.parametrize(("epochs", "rate"), [(0, 0.01), (3, 1e4)])
def test_is_left_as_it_was_where_nothing_is_gained(epochs, rate):
    block, forms, hidden, targets, _ = case()
    tuned, before, after = tune(
        block, forms, batches(hidden), batches(targets), epochs=epochs, rate=rate
    )
    assert before == after
    assert all(tuned[name] is form for name, form in forms.items())


def test_passes_arguments_on_in_float32():
    block, forms, hidden, _, _ = case(torch.bfloat16)
    arguments = Arguments((), {"scale": torch.tensor(2.0, dtype=torch.bfloat16)})
    targets = [batch + 1 for batch in hidden]
    _, before, after = tune(block, forms, batches(hidden), batches(targets), arguments, epochs=3)
    assert after < before


def test_a_transposed_weight_is_trained_alike():
    """gpt2 stores `[in, out]`: the same problem, the same result."""
    block, forms, hidden, targets, _ = case()
    plain, _, _ = tune(block, forms, batches(hidden), batches(targets), epochs=2)

    class Transposed(nn.Module):
        def __init__(self, linear):
            super().__init__()
            self.weight = nn.Parameter(linear.weight.T.clone(), requires_grad=False)

        def forward(self, x):
            return x @ self.weight

    for name in ("gate", "up", "down"):
        setattr(block, name, Transposed(getattr(block, name)))
    turned, _, _ = tune(
        block,
        forms,
        batches(hidden),
        batches(targets),
        place=lambda weights: {name: weight.T for name, weight in weights.items()},
        epochs=2,
    )
    for name, form in plain.items():
        torch.testing.assert_close(turned[name].dense(), form.dense())
