"""Architectures: streaming block by block is exactly `from_pretrained`, and every family prunes,
packs and reloads.
"""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import compressor.runtime
from compressor.calibration import capture
from compressor.calibration.head import head
from compressor.checkpoint.reader import Reader
from compressor.config.recipe import Recipe
from compressor.errors import CheckpointError
from compressor.model.skeleton import Skeleton
from compressor.run.pipeline import prune
from compressor.tools.unpack import unpack
from tests.causal_types import causal
from tests.families import CORE, EVERY, HANDING, MORE, build

IDS = torch.randint(3, 128, (4, 24), generator=torch.Generator().manual_seed(0))
FAMILIES = [*CORE, *(pytest.param(family, marks=pytest.mark.slow) for family in MORE)]


def blocks_output(model, path):
    """Hidden states leaving the last block of a whole model."""
    caught = []
    handle = model.get_submodule(path)[-1].register_forward_hook(
        lambda module, args, output: caught.append(output)
    )
    with torch.no_grad():
        model(input_ids=IDS, use_cache=False)
    handle.remove()
    return caught[0][0] if isinstance(caught[0], tuple | list) else caught[0]


def score(model):
    with torch.no_grad():
        return model.eval()(IDS, use_cache=False).logits


def tensors_of(folder):
    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


@pytest.mark.parametrize("family", FAMILIES)
def test_streams_to_the_same_bits(family, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("compressor.calibration.capture._BATCH_TOKENS", 48)  # two batches of two
    # from_pretrained computes a table of gptj's in float32, whatever the dtype: there only float32
    # can agree
    folder = build(family, tmp_path, torch.float32) if family == "gptj" else tiny(family)
    skeleton = Skeleton(Reader(folder))
    cpu = torch.device("cpu")
    states = capture.capture(skeleton, IDS, cpu)
    for index, arguments in enumerate(states.arguments):
        assert all(parameter.device.type == "meta" for parameter in skeleton.model.parameters())
        block = skeleton.load_block(index, cpu)
        states.hidden = [capture.run(block, batch, arguments) for batch in states.hidden]
        skeleton.free_block(index)
    whole = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert torch.equal(
        torch.cat([batch.hidden for batch in states.hidden]), blocks_output(whole, skeleton.path)
    )


@pytest.mark.parametrize("batch_tokens", [48, 96])  # two batches of two rows, one of four
@pytest.mark.parametrize("family", HANDING)
def test_every_block_sees_what_it_sees_in_the_whole_model(
    family, batch_tokens, tmp_path, monkeypatch
):
    monkeypatch.setattr("compressor.calibration.capture._BATCH_TOKENS", batch_tokens)
    folder = build(family, tmp_path, torch.float32)
    skeleton, cpu = Skeleton(Reader(folder)), torch.device("cpu")
    whole = AutoModelForCausalLM.from_pretrained(folder).eval()
    leaving = [[] for _ in skeleton.blocks]
    for block, seen in zip(whole.get_submodule(skeleton.path), leaving, strict=True):
        block.register_forward_hook(
            lambda _, __, output, seen=seen: seen.append(
                output[0] if isinstance(output, tuple | list) else output
            )
        )
    with torch.no_grad():
        logits = [
            whole(ids, use_cache=False).logits for ids in IDS.split(batch_tokens // IDS.shape[1])
        ]
    states = capture.capture(skeleton, IDS, cpu)
    for index, arguments in enumerate(states.arguments):
        block = skeleton.load_block(index, cpu)
        states.hidden = [capture.run(block, batch, arguments) for batch in states.hidden]
        skeleton.free_block(index)
        for batch, exact in zip(states.hidden, leaving[index], strict=True):
            assert (batch.hidden - exact).abs().max() <= 1e-4 * exact.abs().max()
    assert not states.hidden[0].handed  # nothing is kept that no block reads
    with head(skeleton, states, cpu) as head_of, torch.no_grad():
        for batch, exact in zip(states.hidden, logits, strict=True):
            torch.testing.assert_close(head_of(batch.number, batch.hidden), exact)


@pytest.mark.parametrize("family", ["gemma3n_text", "glm_moe_dsa"])
def test_a_run_that_goes_on_has_what_blocks_handed_on(family, rows, tmp_path, monkeypatch):
    monkeypatch.setattr("compressor.calibration.capture._BATCH_TOKENS", 64)
    folder = build(family, tmp_path / "model", torch.float32)
    recipe = Recipe(str(folder), dataset=str(rows), num_samples=8, seq_len=32)

    def stop(step, done, *_, **__):
        if step == "blocks" and done == 3:  # shared keys, shared indices are under way
            raise KeyboardInterrupt

    prune(recipe, tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        prune(recipe, tmp_path / "out", progress=stop)
    assert list((tmp_path / ".out.partial").glob("hidden.0.handed.*"))
    assert prune(recipe, tmp_path / "out").run["resumed_at_block"] == 3
    whole, out = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "out")
    assert whole.keys() == out.keys()
    assert all(torch.equal(whole[name], out[name]) for name in whole)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["wanda", "armor"])
def test_prunes_packs_and_reloads(family, method, rows, tmp_path):
    """In float32: packed and dense models add up in different orders, and in bfloat16 a router may
    then choose otherwise.
    """
    options = (
        {"block_size": 8, "overhead": 0.9, "iterations": 1, "finish": 0}
        if method == "armor"
        else {}
    )
    folder = build(family, tmp_path / "model", torch.float32)
    recipe = Recipe(
        str(folder), method=method, options=options, dataset=str(rows), num_samples=8, seq_len=32
    )
    report = prune(recipe, tmp_path / "out")
    assert {row.format for row in report.linears} <= {"sparse24", "armor"}
    assert all(row.sparsity == pytest.approx(0.5, abs=0.01) for row in report.linears)
    # dense: where a CPU has kernels they add up in another order
    ours = compressor.runtime.load(tmp_path / "out", runtime="dense")
    logits = score(ours)
    # gpt_oss's experts are [in, out] in the plain model, and sums are taken in another order
    atol = 1e-4 if method != "wanda" else 1e-6 if family == "gpt_oss" else 0
    ours.save_pretrained(tmp_path / "again")
    stored, again = tensors_of(tmp_path / "out"), tensors_of(tmp_path / "again")
    assert stored.keys() == again.keys()
    assert all(torch.equal(stored[name], again[name]) for name in stored)
    reloaded = compressor.runtime.load(tmp_path / "again", runtime="dense")
    assert torch.equal(score(reloaded), logits)
    chosen = compressor.runtime.load(tmp_path / "again")
    torch.testing.assert_close(score(chosen), logits, rtol=0, atol=1e-4)
    unpack(tmp_path / "out", tmp_path / "dense")
    assert tensors_of(tmp_path / "dense").keys() == tensors_of(folder).keys()
    plain, info = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(score(plain), logits, rtol=0, atol=atol)
    ours.dequantize()
    torch.testing.assert_close(score(ours), logits, rtol=0, atol=atol)
    assert sum(row.bytes for row in report.linears) < sum(row.dense_bytes for row in report.linears)


def test_every_family_is_named():
    assert len(EVERY) >= 33


def test_unknown_stacks_are_refused_by_name_or_left_dense_on_request(tmp_path, rows):
    causal("jetmoe").save_pretrained(tmp_path / "moe")
    recipe = Recipe(str(tmp_path / "moe"), dataset=str(rows), num_samples=8, seq_len=32)
    with pytest.raises(
        CheckpointError,
        match=r"mlp\.input_linear\.weight has shape \[4, 192, 64\]: weights stacked in this way",
    ):
        prune(recipe, tmp_path / "out")
    ignore = ["*put_linear*"]
    report = prune(Recipe(**{**recipe.__dict__, "ignore": ignore}), tmp_path / "out")
    reasons = {left.name: left.reason for left in report.left_dense}
    assert reasons["model.layers.0.mlp.output_linear.weight"] == "--ignore *put_linear*"
    assert json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"][
        "modules"
    ]
