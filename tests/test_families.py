"""Architectures: streaming block by block is exactly `from_pretrained`, and every family prunes, packs and reloads."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import compressor.runtime
from compressor import calibration
from compressor.checkpoint import Reader
from compressor.errors import CheckpointError
from compressor.model import Skeleton
from compressor.pipeline import prune
from compressor.recipe import Recipe
from tests.conftest import FAMILIES

IDS = torch.randint(3, 128, (4, 24), generator=torch.Generator().manual_seed(0))


def blocks_output(model, path):
    """Hidden states leaving the last block of a whole model."""
    caught = []
    handle = model.get_submodule(path)[-1].register_forward_hook(lambda module, args, output: caught.append(output))
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    handle.remove()
    return caught[0][0] if isinstance(caught[0], tuple) else caught[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_streams_to_the_same_bits(family, tiny, monkeypatch):
    monkeypatch.setattr("compressor.calibration._BATCH_TOKENS", 48)  # two batches of two
    skeleton = Skeleton(Reader(tiny(family)))
    cpu = torch.device("cpu")
    states = calibration.capture(skeleton, IDS, cpu)
    for index, arguments in enumerate(states.arguments):
        assert all(parameter.device.type == "meta" for parameter in skeleton.model.parameters())
        block = skeleton.load_block(index, cpu)
        states.hidden = [calibration.run(block, hidden, arguments) for hidden in states.hidden]
        skeleton.free_block(index)
    whole = AutoModelForCausalLM.from_pretrained(tiny(family)).eval()
    assert torch.equal(torch.cat(states.hidden), blocks_output(whole, skeleton.path))


@pytest.mark.parametrize("family", FAMILIES)
def test_prunes_packs_and_reloads(family, tiny, rows, tmp_path):
    packed = prune(Recipe(str(tiny(family)), dataset=str(rows), num_samples=8, seq_len=32), tmp_path / "packed")
    prune(Recipe(str(tiny(family)), dataset=str(rows), num_samples=8, seq_len=32, format="dense"), tmp_path / "dense")
    assert {row.format for row in packed.linears} == {"sparse24"}
    assert all(row.sparsity == pytest.approx(0.5, abs=0.01) for row in packed.linears)
    ours = compressor.runtime.load(tmp_path / "packed")
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    with torch.no_grad():
        assert torch.equal(ours(IDS).logits, plain.eval()(IDS).logits)
    assert sum(row.bytes for row in packed.linears) < sum(row.dense_bytes for row in packed.linears)


def test_stacked_experts_are_refused_by_name_or_left_dense_on_request(tmp_path, rows):
    from transformers import AutoConfig

    config = AutoConfig.for_model("mixtral", vocab_size=128, num_local_experts=4, num_experts_per_tok=2, **FAMILIES["llama"])
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "moe")
    recipe = Recipe(str(tmp_path / "moe"), dataset=str(rows), num_samples=8, seq_len=32)
    with pytest.raises(CheckpointError, match=r"experts\.gate_up_proj has shape \[4, 192, 64\]: stacked expert weights"):
        prune(recipe, tmp_path / "out")
    report = prune(Recipe(**{**recipe.__dict__, "ignore": ["*experts*"]}), tmp_path / "out")
    reasons = {left.name: left.reason for left in report.left_dense}
    assert reasons["model.layers.0.mlp.experts.down_proj"] == "--ignore *experts*"
    assert reasons["model.layers.0.mlp.gate.weight"] == "not a linear layer"
    assert compressor.runtime.load(tmp_path / "out").generate(IDS[:1, :4], max_new_tokens=2, do_sample=False).shape == (1, 6)
