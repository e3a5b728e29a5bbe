"""Experts that a family has all in one tensor on disk: packed one by one, loaded, turned back into
that tensor; gpt-oss from MXFP4 through everything.
"""

import hashlib
import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import Transpose, WeightConverter

import compressor.runtime
from compressor.checkpoint.manifest import NAME, manifest
from compressor.checkpoint.packed_config import shared_tensors, stored_modules
from compressor.checkpoint.reader import Reader
from compressor.config.recipe import Recipe
from compressor.errors import CheckpointError
from compressor.run.pipeline import prune
from compressor.tools.unpack import unpack
from compressor.tools.verify import verify
from tests.families import EVERY, build
from tests.quantised_folders import to_mxfp4
from tests.test_distributed import in_processes
from tests.test_resume import contents

IDS = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0))
ARMOR = {"block_size": 8, "overhead": 0.9, "iterations": 1, "finish": 0}
METHODS = {
    "wanda": {},
    "armor": {"method": "armor", "options": ARMOR},
    "lowrank": {"method": "svd_llm", "keep": "60%"},
}


def together(folder, turned=False):
    """A qwen3_5_moe checkpoint as it is published: a tensor for all experts; `turned` as Qwen3-VL
    has it, `[experts, in, out]`.
    """
    torch.manual_seed(0)
    config = AutoConfig.for_model("qwen3_5_moe_text", vocab_size=128, **EVERY["qwen3_next"])
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    stacks = ("experts.gate_up_proj", "experts.down_proj")
    tensors = {
        name: (t.transpose(1, 2) if turned and name.endswith(stacks) else t).contiguous()
        for name, t in model.state_dict().items()
    }
    for path in folder.glob("model*"):
        path.unlink()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """A function: what is asked for -> a checkpoint in float32, made once."""
    made = {}

    def make(kind):
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind.replace(" ", "-")) / "model"
            if kind.startswith("qwen3_5_moe"):
                made[kind] = together(folder, turned="turned" in kind)
            else:
                made[kind] = build(kind, folder, torch.float32)
        return made[kind]

    return make


@pytest.fixture
def turns():
    """The conversion that Qwen3-VL has, for another family."""
    from transformers import conversion_mapping

    before = conversion_mapping.get_checkpoint_conversion_mapping("qwen3_5_moe_text")
    steps = [
        WeightConverter(
            source_patterns=f"mlp.experts.{stack}",
            target_patterns=f"mlp.experts.{stack}",
            operations=[Transpose(1, 2, check_dims=True)],
        )
        for stack in ("gate_up_proj", "down_proj")
    ]
    register_checkpoint_conversion_mapping("qwen3_5_moe_text", steps, overwrite=True)
    yield
    register_checkpoint_conversion_mapping("qwen3_5_moe_text", before, overwrite=True)


def recipe(folder, rows, **settings):
    return Recipe(str(folder), dataset=str(rows), num_samples=8, seq_len=32, **settings)


def tensors_of(folder):
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= load_file(path)
    return found


@torch.no_grad()
def logits(model):
    return model.eval()(IDS, use_cache=False).logits


def check_round(folder, out, tmp_path, *, exact):
    """The packed `out` of `folder` loads, saves, unpacks and is made dense to the same model."""
    assert not verify(out)["problems"]
    ours = compressor.runtime.load(out)
    packed = logits(ours)
    ours.save_pretrained(tmp_path / "again")
    stored, again = tensors_of(out), tensors_of(tmp_path / "again")
    assert stored.keys() == again.keys()
    assert all(torch.equal(stored[name], again[name]) for name in stored)
    assert torch.equal(logits(compressor.runtime.load(tmp_path / "again")), packed)
    unpack(out, tmp_path / "plain")
    plain, before = Reader(tmp_path / "plain"), Reader(folder)
    assert plain.config == before.config
    assert plain.tensors.keys() == before.tensors.keys()
    assert all(plain.tensors[n].shape == before.tensors[n].shape for n in before.tensors)
    twin, info = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tolerance = 1e-6 if exact else 1e-4  # sums in another order than over [in, out]
    torch.testing.assert_close(logits(twin), packed, rtol=0, atol=tolerance)
    ours.dequantize()
    torch.testing.assert_close(logits(ours), logits(twin), rtol=0, atol=1e-6)
    ours.save_pretrained(tmp_path / "dense")
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    weights = saved.state_dict()
    assert weights.keys() == ours.state_dict().keys()
    assert all(torch.equal(weights[name], one) for name, one in ours.state_dict().items())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["gpt_oss", "granitemoe", "qwen3_5_moe"])
def test_experts_in_one_tensor_are_packed(kind, method, folder_of, rows, tmp_path):
    report = prune(recipe(folder_of(kind), rows, **METHODS[method]), tmp_path / "out")
    experts = [row for row in report.linears if ".experts." in row.name]
    assert len(experts) == 3 * 4 * 2
    assert {row.format for row in experts} <= {"sparse24", "armor", "pivot"}
    assert sum(row.bytes for row in experts) < 0.66 * sum(row.dense_bytes for row in experts)
    assert report.output_bytes == Reader(tmp_path / "out").nbytes
    check_round(folder_of(kind), tmp_path / "out", tmp_path, exact=method == "wanda")


def test_experts_that_are_turned_on_disk_are_packed(turns, folder_of, rows, tmp_path):
    report = prune(recipe(folder_of("qwen3_5_moe turned"), rows), tmp_path / "out")
    assert {row.format for row in report.linears} == {"sparse24"}
    check_round(folder_of("qwen3_5_moe turned"), tmp_path / "out", tmp_path, exact=True)


@pytest.mark.parametrize("kind", ["gpt_oss", "granitemoe", "qwen3_5_moe"])
def test_packed_they_are_what_zeros_in_place_are(kind, folder_of, rows, tmp_path):
    prune(recipe(folder_of(kind), rows), tmp_path / "out")
    prune(recipe(folder_of(kind), rows, format="dense"), tmp_path / "dense")
    assert not verify(tmp_path / "dense")["problems"]
    unpack(tmp_path / "out", tmp_path / "plain")
    dense, plain = tensors_of(tmp_path / "dense"), tensors_of(tmp_path / "plain")
    assert dense.keys() == plain.keys()
    assert all(torch.equal(dense[name], plain[name]) for name in dense)


def test_the_names_are_those_of_families_with_a_tensor_each(folder_of, rows, tmp_path):
    report = prune(recipe(folder_of("granitemoe"), rows, method="magnitude"), tmp_path / "out")
    name = "model.layers.1.block_sparse_moe.experts.2.down_proj"
    assert name in {row.name for row in report.linears}
    modules = stored_modules(Reader(tmp_path / "out").config, Reader(tmp_path / "out").tensors)
    where = {"tensor": "model.layers.1.block_sparse_moe.output_linear.weight", "at": 2}
    assert modules[name] == {"format": "sparse24", **where}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"at": 0}, "gives .*experts.3.down_proj the place 0 of"),
        ({"at": 7}, "lists 4 matrices of .*, and number 3 is not among them"),
        ({"tensor": "model.elsewhere"}, "lists|lacks"),
        ({"at": "3"}, "says|lists"),
        ({"transposed": 1}, "says|has shape"),
    ],
)
def test_a_wrong_place_is_told(change, message, folder_of, rows, tmp_path):
    out = tmp_path / "out"
    prune(recipe(folder_of("gpt_oss"), rows, method="magnitude"), out)
    config = json.loads((out / "config.json").read_text())
    entry = config["quantization_config"]["modules"]["model.layers.0.mlp.experts.3.down_proj"]
    entry |= change
    (out / "config.json").write_text(json.dumps(config))
    hashes = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in out.iterdir()
        if path.name != NAME
    }
    (out / NAME).write_text(manifest(hashes))
    problems = verify(out)["problems"]
    assert any(re.search(message, problem) for problem in problems), problems
    with pytest.raises(CheckpointError):
        unpack(out, tmp_path / "plain")
    assert not (tmp_path / "plain").exists()


def test_a_table_with_a_hole_is_told():
    entries = {
        f"m.experts.{n}.up": {"format": "sparse24", "tensor": "t", "at": n} for n in range(3)
    }
    assert shared_tensors(entries) == {"t": list(entries)}
    del entries["m.experts.1.up"]
    with pytest.raises(CheckpointError, match="lists 2 matrices of t, and number 1"):
        shared_tensors(entries)


@pytest.fixture(scope="module")
def oss(tmp_path_factory):
    """gpt-oss with MXFP4 experts, and its dense twin."""
    made = tmp_path_factory.mktemp("oss")
    to_mxfp4(build("gpt_oss", made / "dense"), made / "mxfp4", made / "twin")
    return made


@pytest.mark.parametrize("method", METHODS)
def test_gpt_oss_from_mxfp4_is_compressed_as_its_dense_twin(method, oss, rows, tmp_path):
    report = prune(recipe(oss / "mxfp4", rows, **METHODS[method]), tmp_path / "out")
    prune(recipe(oss / "twin", rows, **METHODS[method]), tmp_path / "twin")
    assert report.notes[0].startswith("the model is quantised (mxfp4): 6 tensors are read as bf")
    for path in [*(tmp_path / "twin").glob("*.safetensors"), tmp_path / "twin/config.json"]:
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    assert not verify(tmp_path / "out")["problems"]
    assert torch.isfinite(logits(compressor.runtime.load(tmp_path / "out"))).all()


def test_a_run_from_mxfp4_that_was_cut_off_goes_on(oss, rows, tmp_path):
    job = recipe(oss / "mxfp4", rows)

    def stop(step, done, *_, **__):
        if step == "blocks" and done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prune(job, tmp_path / "out", progress=stop)
    assert prune(job, tmp_path / "out").run["resumed_at_block"] == 2
    prune(job, tmp_path / "whole")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("method", ["wanda", "armor"])
def test_two_processes_take_mxfp4(method, oss, rows, tmp_path, monkeypatch):
    monkeypatch.setattr("compressor.calibration.capture._BATCH_TOKENS", 64)
    job = recipe(oss / "mxfp4", rows, **METHODS[method])
    codes, said = in_processes(2, lambda rank: prune(job, tmp_path / "two"))
    assert codes == [0, 0], said
    prune(job, tmp_path / "one")
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
