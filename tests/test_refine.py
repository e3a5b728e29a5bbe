import inspect

import pytest
import torch

from compressor.errors import UsageError
from compressor.pattern import Pattern
from compressor.refine import NAMES, refinement
from compressor.stats import InputStats


@pytest.mark.parametrize("name", NAMES)
def test_is_a_module_whose_options_are_keyword_only_with_defaults(name):
    module = refinement(name)
    parameters = list(inspect.signature(module.refine).parameters.values())
    assert [p.name for p in parameters[:4]] == ["weight", "pruned", "stats", "pattern"]
    assert all(p.kind is p.KEYWORD_ONLY and p.default is not p.empty for p in parameters[4:])
    assert isinstance(module.NEEDS_GRAM, bool)


def test_unknown_name_is_a_usage_error_with_a_suggestion():
    with pytest.raises(
        UsageError, match=r"unknown refinement 'dsnt'.*known: .*did you mean 'dsnot'\?"
    ):
        refinement("dsnt")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_keeps_dtype_and_arguments(name, dtype):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(200, 32, generator=generator) + torch.randn(32, generator=generator)
    stats = InputStats(32, gram=True, moments=True)
    stats.update(x)
    weight = torch.randn(8, 32, generator=generator).to(dtype)
    pattern = Pattern.parse("2:4")
    pruned = weight * pattern.mask(weight.float().abs() * stats.norm)
    gram, given = stats.gram, (weight.clone(), pruned.clone())
    before = gram.clone()
    refined = refinement(name).refine(weight, pruned, stats, pattern)
    assert refined.dtype == dtype
    assert pattern.is_legal(refined)
    assert not torch.equal(refined, pruned)
    assert torch.equal(weight, given[0])
    assert torch.equal(pruned, given[1])
    assert torch.equal(gram, before)


@pytest.mark.parametrize("name", NAMES)
def test_result_does_not_depend_on_how_rows_are_chunked(name, monkeypatch):
    generator = torch.Generator().manual_seed(1)
    stats = InputStats(64, gram=True, moments=True)
    stats.update(
        torch.randn(300, 64, generator=generator) @ torch.randn(64, 64, generator=generator) + 1
    )
    weight = torch.randn(21, 64, generator=generator)
    pattern = Pattern.parse("2:4")
    pruned = weight * pattern.mask(weight.abs() * stats.norm)
    whole = refinement(name).refine(weight, pruned, stats, pattern)
    monkeypatch.setattr("compressor.refine.quadratic._CHUNK", 64 * 4)
    parts = refinement(name).refine(weight, pruned, stats, pattern)
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-4)
