"""A pass that is made for statistics alone does without the product of the last linear."""

import pytest
import torch
from torch import nn

from compressor.calibration.last_linear import sparing_last
from compressor.config.recipe import Recipe
from compressor.engine import observe
from compressor.errors import CheckpointError
from compressor.model.linear import own_linear
from compressor.run import pipeline
from compressor.stats import collecting
from tests.test_resume import contents


class Block(nn.Module):
    """`order` says which of its linears is called when."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)
        self.order = ["up", "down"]

    def forward(self, x):
        for name in self.order:
            x = getattr(self, name)(x)
        return x


def linears_of(block):
    return [own_linear(name, name, getattr(block, name), False) for name in ("up", "down")]


def test_the_last_linear_computes_nothing_and_is_whole_again_afterwards():
    block, x = Block(), torch.randn(2, 3, 4)
    exact, computed = block(x), []
    handle = block.down.register_forward_hook(
        lambda module, args, y: computed.append(bool(y.any()))
    )
    linears = linears_of(block)
    modules = {linear.name: linear.module for linear in linears}
    with collecting(modules) as stats, sparing_last(linears) as last:
        for spare in (False, True, True):
            last.begin(spare=spare)
            assert block(x).shape == exact.shape
    assert computed == [True, False, False]
    assert stats["down"].tokens == stats["up"].tokens == 18
    handle.remove()
    assert torch.equal(block(x), exact)


def test_the_first_pass_is_whole():
    block = Block()
    with sparing_last(linears_of(block)) as last:
        last.begin(spare=True)
        assert bool(block(torch.randn(2, 4)).any())


def test_a_linear_that_is_called_twice_is_computed():
    block = Block()
    block.order = ["up", "down", "up", "down"]
    with sparing_last(linears_of(block)) as last:
        for _ in range(2):
            last.begin(spare=True)
            assert bool(block(torch.randn(2, 4)).any())


def test_another_order_is_refused():
    block = Block()
    with sparing_last(linears_of(block)) as last:
        last.begin(spare=True)
        block(torch.randn(2, 4))
        last.begin(spare=True)
        block.order = ["up", "down", "up"]
        with pytest.raises(CheckpointError, match="up is computed after the linear that was the"):
            block(torch.randn(2, 4))
    block.order = ["up", "down"]
    assert bool(block(torch.randn(2, 4)).any())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gptj", "qwen3_moe"])
def test_a_run_that_spares_products_gives_the_same_bytes(monkeypatch, tiny, rows, tmp_path, family):
    monkeypatch.setattr("compressor.calibration.capture._BATCH_TOKENS", 64)
    recipe = Recipe(
        model=str(tiny(family)), dataset=str(rows), num_samples=8, seq_len=32, method="sparsegpt"
    )
    pipeline.prune(recipe, tmp_path / "spared")
    monkeypatch.setattr(observe, "ERROR_BATCHES", 1000)
    report = pipeline.prune(recipe, tmp_path / "whole")
    assert report.blocks
    for folder in ("spared", "whole"):
        (tmp_path / folder / "report.json").unlink()
        (tmp_path / folder / "SHA256SUMS").unlink(missing_ok=True)
    assert contents(tmp_path / "spared") == contents(tmp_path / "whole")
