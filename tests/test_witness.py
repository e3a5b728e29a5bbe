"""Before a run says done, its output is loaded block by block and held against what was
compressed.
"""

import pytest
import torch

from compressor.config.recipe import Recipe
from compressor.errors import CheckpointError
from compressor.formats.sparse24 import Sparse24
from compressor.run.pipeline import prune
from compressor.run.witness import Witness
from tests.families import build

ARMOR = {"block_size": 8, "overhead": 0.9, "iterations": 1, "finish": 0}


def recipe(folder, rows, **settings):
    return Recipe(str(folder), dataset=str(rows), num_samples=8, seq_len=32, **settings)


@pytest.fixture
def differing(monkeypatch):
    """For each block that is compared: how far the loaded output is from what was compressed."""
    from compressor.run import witness

    seen, alike = [], witness._alike

    def note(found, exact, entering, near):
        seen.append((found - exact).abs().max().item() / exact.abs().max().item())
        return alike(found, exact, entering, near)

    monkeypatch.setattr(witness, "_alike", note)
    return seen


@pytest.mark.parametrize(
    ("family", "kinds"), [("llama", 1), ("gpt2", 1), ("gpt_oss", 2), ("jamba", 2), ("zaya", 2)]
)
def test_what_was_written_computes_the_same(family, kinds, rows, tmp_path, differing):
    prune(recipe(build(family, tmp_path / "model", torch.float32), rows), tmp_path / "out")
    assert len(differing) >= kinds
    assert max(differing) < 1e-5


@pytest.mark.parametrize("settings", [{"format": "dense"}, {"method": "armor", "options": ARMOR}])
def test_other_forms(settings, tiny, rows, tmp_path, differing):
    prune(recipe(tiny("qwen3_moe"), rows, **settings), tmp_path / "out")
    assert differing


def test_what_blocks_hand_on_is_kept_too(rows, tmp_path, monkeypatch, differing):
    monkeypatch.setattr("compressor.calibration.capture._BATCH_TOKENS", 64)
    folder = build("glm_moe_dsa", tmp_path / "model", torch.float32)
    asked = recipe(folder, rows)

    def stop(step, done, *_, **__):
        if step == "blocks" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(asked, tmp_path / "out", progress=stop)
    assert not differing
    prune(asked, tmp_path / "out")  # of blocks before the interruption too
    assert len(differing) == 3
    assert max(differing) < 1e-5


def wrong_values(self):
    """Every second value with the other sign: sound headers, sound metadata, finite numbers."""
    values, metadata = self.values.clone(), self.metadata
    values[:, ::2] *= -1
    return dict(zip(self.SUFFIXES, (values, metadata), strict=True))


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_an_output_that_computes_something_else_is_not_finished(
    family, tiny, rows, tmp_path, monkeypatch
):
    folder = tiny(family)
    monkeypatch.setattr(Sparse24, "pack", wrong_values)
    with pytest.raises(CheckpointError, match="computes something else, loaded from") as error:
        prune(recipe(folder, rows), tmp_path / "out")
    assert "layers.0 " in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def test_an_output_that_would_not_load_is_not_finished(tiny, tmp_path, monkeypatch):
    """A method without calibration calls no block; the headers are compared all the same."""
    pack = Sparse24.pack
    monkeypatch.setattr(
        Sparse24, "pack", lambda self: {k: v[:-1].contiguous() for k, v in pack(self).items()}
    )
    with pytest.raises(CheckpointError, match="has shape"):
        prune(Recipe(str(tiny("llama")), method="magnitude"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_one_block_of_each_kind_is_looked_at(tiny):
    from compressor.run.check import plan_run

    witness = Witness(
        plan_run(Recipe(str(tiny("gemma2")), method="magnitude"), None), tiny("llama")
    )
    assert witness.blocks == [0, 1]  # sliding and full attention
