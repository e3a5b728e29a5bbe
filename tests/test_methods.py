"""What every method promises, whatever its formula."""

import pytest
import torch

from compressor.errors import UsageError
from compressor.methods import METHODS, method_module
from compressor.pattern import Pattern
from compressor.stats import InputStats, output_error

PRUNERS = [name for name in METHODS if method_module(name).REFINABLE]


def correlated(rows, columns, tokens=400, seed=0):
    """A weight and statistics of inputs that are correlated and of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5 + torch.eye(columns)
    x = torch.randn(tokens, columns, generator=generator) @ mix * torch.logspace(-1, 1, columns)
    stats = InputStats(columns, gram=True)
    stats.update(x)
    return torch.randn(rows, columns, generator=generator), stats


@pytest.mark.parametrize("name", PRUNERS)
@pytest.mark.parametrize("text", ["2:4", "4:8", "1:4", "50%"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_pattern_dtype_and_shape_are_kept(name, text, dtype):
    weight, stats = correlated(24, 64)
    pattern = Pattern.parse(text)
    pruned = method_module(name).compress(weight.to(dtype), stats, pattern).dense()
    assert pruned.dtype == dtype
    assert pruned.shape == weight.shape
    assert pattern.is_legal(pruned)
    assert (pruned == 0).float().mean().item() == pytest.approx(float(pattern.sparsity), abs=0.02)


@pytest.mark.parametrize("name", [name for name in PRUNERS if name != "magnitude"])
def test_beats_magnitude_on_correlated_inputs(name):
    weight, stats = correlated(48, 64)
    for text in ("2:4", "50%"):
        pattern = Pattern.parse(text)
        ours = method_module(name).compress(weight, stats, pattern).dense()
        magnitude = method_module("magnitude").compress(weight, stats, pattern).dense()
        assert output_error(weight, ours, stats) < output_error(weight, magnitude, stats)


@pytest.mark.parametrize("name", [name for name in PRUNERS if name != "nowag"])
def test_a_sparse_weight_stays_as_it_is(name):
    weight, stats = correlated(16, 32)
    pattern = Pattern.parse("2:4")
    once = method_module("wanda").compress(weight, stats, pattern).dense()
    again = method_module(name).compress(once, stats, pattern).dense()
    torch.testing.assert_close(again, once, rtol=1e-5, atol=1e-6)


def test_unknown_method_suggests():
    with pytest.raises(UsageError, match="did you mean 'wanda'"):
        method_module("wnada")
