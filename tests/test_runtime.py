"""A packed folder in transformers: loading, saving, devices, and the refusal to load without the
plug-in.
"""

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

import compressor
import compressor.runtime
from compressor.checkpoint.packed_config import GUARD
from compressor.config.recipe import Recipe
from compressor.errors import CheckpointError, UsageError
from compressor.run.pipeline import prune
from compressor.tools.unpack import unpack
from compressor_kernels import layouts
from compressor_kernels.cpu import build
from compressor_kernels.layouts import Stored
from tests.cpu_problems import here

IDS = torch.arange(4, 40)[None]
OFFLOAD = {
    "model.embed_tokens": "cpu",
    "model.layers": "disk",
    "model.norm": "cpu",
    "model.rotary_emb": "cpu",
    "lm_head": "cpu",
}


@pytest.fixture(scope="module")
def packed(tmp_path_factory, demo_model):
    folder = tmp_path_factory.mktemp("packed") / "out"
    prune(Recipe(str(demo_model), method="magnitude"), folder)
    return folder


@pytest.fixture(scope="module")
def logits(packed):
    return score(compressor.load(packed))


def score(model):
    with torch.no_grad():
        return model(IDS).logits


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_equal_the_dense_export_bit_for_bit(packed, demo_model, tmp_path, dtype):
    prune(Recipe(str(demo_model), method="magnitude", format="dense"), tmp_path / "dense")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=dtype).eval()
    assert torch.equal(score(compressor.load(packed, dtype=dtype)), score(plain))


def test_plain_from_pretrained_after_the_import(packed, logits):
    model, info = AutoModelForCausalLM.from_pretrained(packed, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert torch.equal(score(model.eval()), logits)
    assert model.generate(IDS[:, :5], max_new_tokens=4, do_sample=False).shape == (1, 9)


@pytest.mark.parametrize("device_map", ["auto", OFFLOAD], ids=["auto", "disk"])
def test_device_map(packed, logits, tmp_path, device_map):
    model = AutoModelForCausalLM.from_pretrained(
        packed, device_map=device_map, offload_folder=tmp_path
    )
    assert torch.equal(score(model.eval()), logits)


def test_runtime_packed_keeps_the_packed_weights_on_the_cpu_too(packed, logits, monkeypatch):
    monkeypatch.setattr(build, "_found", build.Kernels("no kernel runs here"))
    with pytest.warns(UserWarning, match="packed weights are computed dense: no kernel runs here"):
        model = compressor.load(packed, runtime="packed")
    assert set(compressor.runtime.runtimes(model).values()) == {
        "packed, unpacked at every call: no kernel runs here"
    }
    assert model.model.layers[0].mlp.up_proj.layout is Stored
    assert torch.equal(score(model), logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_runtime_packed_computes_on_the_cpu_what_the_dense_weights_give(packed, dtype):
    here()
    dense = compressor.load(packed, runtime="dense", dtype=dtype)
    model = compressor.load(packed, runtime="packed", dtype=dtype)
    told = compressor.runtime.runtimes(model)
    together = "packed; one launch for gate_proj, up_proj"
    assert told["model.layers.0.mlp.up_proj"] == together
    assert told["model.layers.0.self_attn.o_proj"] == "packed"
    exact = score(compressor.load(packed, runtime="dense", dtype=torch.float32))
    bar = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}[dtype]
    assert (score(model).float() - exact).norm() <= bar * exact.norm()
    sampled = {"max_new_tokens": 12, "do_sample": False}
    if dtype == torch.float32:
        eager = model.generate(IDS[:, :5], **sampled)
        assert torch.equal(eager, dense.generate(IDS[:, :5], **sampled))
        static = model.generate(IDS[:, :5], cache_implementation="static", **sampled)
        assert torch.equal(static, eager)


def test_loading_on_the_cpu_never_holds_a_dense_matrix(packed, monkeypatch):
    here()
    monkeypatch.setattr(layouts, "unpack24", None)
    monkeypatch.setattr("compressor_kernels.reference.unpack24", None)
    model = compressor.load(packed, runtime="packed")
    assert model.model.layers[0].mlp.up_proj.layout is layouts.InTiles


def test_the_choice_is_listed_and_an_unknown_one_refused(packed, demo_model):
    told = set(compressor.runtime.runtimes(compressor.load(packed)).values())
    assert "dense: 384 x 128 is too small to gain on a CPU" in told
    assert all(text.endswith("is too small to gain on a CPU") for text in told)
    assert not compressor.runtime.runtimes(compressor.load(demo_model))
    with pytest.raises(UsageError, match="runtime is 'fast'; accepted: auto, packed, dense"):
        compressor.load(packed, runtime="fast")


def test_save_pretrained_gives_the_same_bytes_and_keeps_the_guard(packed, logits, tmp_path):
    compressor.load(packed).save_pretrained(tmp_path / "again")
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert config["transformers_weights"] == GUARD
    before, after = (
        load_file(packed / "model.safetensors"),
        load_file(tmp_path / "again" / "model.safetensors"),
    )
    assert set(before) == set(after)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(score(compressor.load(tmp_path / "again")), logits)


def test_dequantize_gives_plain_linears(packed, logits, tmp_path):
    model = compressor.load(packed)
    model.dequantize()
    assert type(model.model.layers[0].mlp.up_proj) is nn.Linear
    model.save_pretrained(tmp_path / "plain")
    assert not {"quantization_config", "transformers_weights"} & set(
        json.loads((tmp_path / "plain" / "config.json").read_text())
    )
    assert torch.equal(
        score(AutoModelForCausalLM.from_pretrained(tmp_path / "plain").eval()), logits
    )


def test_unpack_gives_a_plain_checkpoint(packed, logits, tmp_path):
    unpack(packed, tmp_path / "dense")
    code = (
        "import sys, torch\nfrom transformers import AutoModelForCausalLM\n"
        f"model = AutoModelForCausalLM.from_pretrained({str(tmp_path / 'dense')!r}).eval()\n"
        "assert 'compressor' not in sys.modules\n"
        f"with torch.no_grad(): torch.save(model(torch.arange(4, 40)[None]).logits, "
        f"{str(tmp_path / 'logits')!r})"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    assert torch.equal(torch.load(tmp_path / "logits"), logits)
    with pytest.raises(CheckpointError, match="plain checkpoint already"):
        unpack(tmp_path / "dense", tmp_path / "x")


def test_without_the_plug_in_it_fails_and_names_the_package(packed):
    code = (
        f"from transformers import "
        f"AutoModelForCausalLM\nAutoModelForCausalLM.from_pretrained({str(packed)!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert "pip install compress-llm" in done.stderr.splitlines()[-1]
    assert "import compressor.runtime" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda config: config["quantization_config"].update(version=99), "format version 99"),
        (lambda config: config["quantization_config"].update(modules=[1]), "must map"),
        (
            lambda config: config["quantization_config"]["modules"].update(
                {"model.layers.77.x": {"format": "sparse24"}}
            ),
            "does not have",
        ),
        (
            lambda config: config["quantization_config"]["modules"].update(
                {"model.norm": {"format": "sparse24"}}
            ),
            "as a packed linear",
        ),
        (
            lambda config: config["quantization_config"]["modules"][
                "model.layers.0.mlp.up_proj"
            ].update(format="zip"),
            "'zip'",
        ),
    ],
)
def test_a_lying_config_is_refused(packed, tmp_path, change, match):
    shutil.copytree(packed, tmp_path / "bad")
    config = json.loads((packed / "config.json").read_text())
    change(config)
    (tmp_path / "bad" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=match):
        compressor.load(tmp_path / "bad")


def test_damaged_metadata_is_refused(packed, tmp_path):
    shutil.copytree(packed, tmp_path / "bad")
    tensors = load_file(packed / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight_metadata"][3, 0] = 0
    save_file(tensors, tmp_path / "bad" / "model.safetensors", metadata={"format": "pt"})
    for read in (compressor.load, lambda folder: unpack(folder, tmp_path / "out")):
        with pytest.raises(
            CheckpointError, match=r"layers\.1\.mlp\.up_proj is damaged: metadata of row 3, group 0"
        ):
            read(tmp_path / "bad")
    assert not (tmp_path / "out").exists()


def test_missing_or_unlisted_weights_are_never_replaced_by_noise(packed, tmp_path):
    shutil.copytree(packed, tmp_path / "short")
    tensors = load_file(packed / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight_values"]
    save_file(tensors, tmp_path / "short" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.1\.mlp\.up_proj"):
        compressor.load(tmp_path / "short")
    shutil.copytree(packed, tmp_path / "unlisted")
    config = json.loads((packed / "config.json").read_text())
    del config["quantization_config"]["modules"]["model.layers.1.mlp.up_proj"]
    (tmp_path / "unlisted" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj"):
        compressor.load(tmp_path / "unlisted")
    with pytest.raises(
        CheckpointError, match=r"up_proj\.weight_values is packed, but config.json does not list it"
    ):
        unpack(tmp_path / "unlisted", tmp_path / "out")
