"""Before anything is compressed, the first blocks are held against the model's own forward."""

from dataclasses import replace

import pytest
import torch

from compressor.calibration import capture, recorder
from compressor.calibration.agreement import check_agreement
from compressor.calibration.arguments import Differing, leaves, tree_of
from compressor.checkpoint.reader import Reader
from compressor.config.recipe import Recipe
from compressor.errors import CheckpointError
from compressor.model.skeleton import Skeleton
from compressor.run.pipeline import prune
from tests.families import build

CPU = torch.device("cpu")
IDS = torch.randint(3, 128, (4, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _two_batches(monkeypatch):
    monkeypatch.setattr("compressor.calibration.capture._BATCH_TOKENS", 48)


def captured(folder):
    skeleton = Skeleton(Reader(folder))
    return skeleton, capture.capture(skeleton, IDS, CPU)


@pytest.mark.parametrize("family", ["llama", "mixtral", "gemma4_text", "zaya"])
def test_what_is_right_passes_and_nothing_stays_loaded(family, tmp_path):
    skeleton, states = captured(build(family, tmp_path, torch.float32))
    entering = [batch.hidden.clone() for batch in states.hidden]
    check_agreement(skeleton, states, CPU)
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())
    for batch, before in zip(states.hidden, entering, strict=True):
        assert torch.equal(batch.hidden, before)
        assert not batch.handed


def test_a_wrong_argument_of_the_second_block_is_seen(tmp_path):
    skeleton, states = captured(build("llama", tmp_path, torch.float32))
    own = states.arguments[1]
    turned = tuple(0 * part for part in own.keywords["position_embeddings"])
    states.arguments[1] = replace(own, keywords={**own.keywords, "position_embeddings": turned})
    with pytest.raises(CheckpointError, match="what leaves block 1 in batch 0 is not what the mod"):
        check_agreement(skeleton, states, CPU)


def test_what_depends_on_the_tokens_and_is_frozen_is_seen_in_the_second_batch(tmp_path):
    skeleton, states = captured(build("gemma4_text", tmp_path, torch.float32))
    own = states.arguments[0]
    frozen = [v for v in leaves(tree_of(own.positional, own.keywords)) if isinstance(v, Differing)]
    assert frozen
    frozen[0].values[1] = frozen[0].values[0]
    with pytest.raises(CheckpointError, match="what leaves block 0 in batch 1 is not what the mod"):
        check_agreement(skeleton, states, CPU)


def test_a_block_that_writes_into_what_it_is_given_is_seen(tmp_path, monkeypatch):
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    forward = LlamaDecoderLayer.forward
    monkeypatch.setattr(
        LlamaDecoderLayer,
        "forward",
        lambda self, hidden_states, **given: forward(self, hidden_states.add_(1), **given),
    )
    skeleton, states = captured(build("llama", tmp_path, torch.float32))
    with pytest.raises(CheckpointError, match="block 0 changes the hidden states that it is given"):
        check_agreement(skeleton, states, CPU)


def test_a_run_ends_with_one_line_and_leaves_nothing(tmp_path, rows, monkeypatch):
    """As it was once: what blocks are called with in the first batch serves all."""
    monkeypatch.setattr(recorder, "_same", lambda one, other: True)
    folder = build("gemma4_text", tmp_path / "model", torch.float32)
    with pytest.raises(CheckpointError, match="otherwise block by block than whole") as error:
        prune(Recipe(str(folder), dataset=str(rows), num_samples=8, seq_len=32), tmp_path / "out")
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
