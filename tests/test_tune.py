import pytest
import torch
from torch import nn

from compressor.pattern import Pattern
from compressor.refine.tune import tune


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
        return (hidden + self.down(nn.functional.silu(self.gate(x)) * self.up(x)) * (1 if scale is None else scale),)


def case(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    block = Block().to(dtype)
    for parameter in block.parameters():
        parameter.requires_grad_(False)
    hidden = [torch.randn(4, 16, 16, dtype=dtype) for _ in range(8)]
    targets = [block(batch)[0] for batch in hidden]
    pattern = Pattern.parse("2:4")
    weights = {name: getattr(block, name).weight for name in ("gate", "up", "down")}
    for weight in weights.values():
        weight.data = weight.data * pattern.mask(weight.float().abs())
    return block, weights, hidden, targets, pattern


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_lowers_the_error_and_keeps_zeros_dtype_and_the_rest(dtype):
    block, weights, hidden, targets, pattern = case(dtype)
    masks = {name: weight != 0 for name, weight in weights.items()}
    norm = block.norm.weight.clone()
    before, after = tune(block, weights, hidden, targets, epochs=20)
    assert after < 0.7 * before
    missed = torch.stack([(block(h)[0] - t).float().square().mean() for h, t in zip(hidden, targets, strict=True)]).mean()
    added = torch.stack([(t - h).float().square().mean() for h, t in zip(hidden, targets, strict=True)]).mean()
    assert abs((missed / added).item() - after) < 1e-3 * after
    for name, weight in weights.items():
        assert weight.dtype == dtype
        assert pattern.is_legal(weight)
        assert not bool(weight[~masks[name]].any())
        assert not weight.requires_grad
        assert weight.grad is None
    assert torch.equal(block.norm.weight, norm)


def test_is_deterministic_and_leaves_the_global_generator_alone():
    results = []
    for _ in range(2):
        block, weights, hidden, targets, _ = case()
        state = torch.get_rng_state()
        tune(block, weights, hidden, targets, epochs=2)
        assert torch.equal(state, torch.get_rng_state())
        results.append(weights["down"].clone())
    assert torch.equal(*results)


@pytest.mark.parametrize(("epochs", "rate"), [(0, 0.01), (3, 1e4)])
def test_is_left_as_it_was_where_nothing_is_gained(epochs, rate):
    block, weights, hidden, targets, _ = case()
    given = {name: weight.clone() for name, weight in weights.items()}
    before, after = tune(block, weights, hidden, targets, epochs=epochs, rate=rate)
    assert before == after
    for name, weight in weights.items():
        assert torch.equal(weight, given[name])


def test_passes_arguments_on_in_float32():
    block, weights, hidden, _, _ = case(torch.bfloat16)
    arguments = ((), {"scale": torch.tensor(2.0, dtype=torch.bfloat16)})
    targets = [batch + 1 for batch in hidden]
    before, after = tune(block, weights, hidden, targets, arguments, epochs=3)
    assert after < before
