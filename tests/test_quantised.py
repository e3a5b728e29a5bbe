"""Checkpoints that are published quantised: every number is the one that its publisher means, and
what is made of such a checkpoint is what is made of its dense twin, byte for byte.
"""

import json
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import compressor.runtime
from compressor.checkpoint.dequantised import open_model
from compressor.checkpoint.reader import Reader
from compressor.config.recipe import Recipe
from compressor.errors import CheckpointError
from compressor.progress import silent
from compressor.run.pipeline import prune
from compressor.tools.pack import pack
from tests.families import build
from tests.quantised_folders import FP8, fp8_block, mxfp4, to_fp8, to_mxfp4
from tests.test_distributed import in_processes
from tests.test_resume import in_child, kill_me

IDS = torch.randint(3, 128, (2, 24), generator=torch.Generator().manual_seed(0))
MXFP4 = {"quant_method": "mxfp4"}


def folder_of(path, tensors, described):
    """A folder of one shard with these tensors."""
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    config = {"model_type": "llama", "torch_dtype": "float16", "quantization_config": described}
    (path / "config.json").write_text(json.dumps(config))
    return path


def random(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 0.05


@pytest.fixture(scope="module")
def ragged(tmp_path_factory):
    """Dense, block FP8 and the dense twin of a model whose sides are no multiples of 128."""
    made = tmp_path_factory.mktemp("ragged")
    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=128, hidden_size=160, intermediate_size=300, num_hidden_layers=2, head_dim=16,
        num_attention_heads=10, num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(made / "dense", max_shard_size="200KB")
    to_fp8(made / "dense", made / "fp8", made / "twin")
    return made


@pytest.fixture(scope="module")
def oss(tmp_path_factory):
    """gpt-oss with MXFP4 experts, and its dense twin."""
    made = tmp_path_factory.mktemp("oss")
    to_mxfp4(build("gpt_oss", made / "dense"), made / "mxfp4", made / "twin")
    return made


def shards(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def pruned(folder, rows, out, progress=silent, **options):
    recipe = {"dataset": str(rows), "num_samples": 8, "seq_len": 32, **options}
    return prune(Recipe(str(folder), **recipe), out, progress=progress)


@pytest.mark.parametrize("scale_dtype", ["float32", "bfloat16", "float8_e8m0fnu", "uint8"])
@pytest.mark.parametrize(("shape", "block"), [((256, 384), (128, 128)), ((96, 64), (1, 32))])
def test_block_fp8_is_what_transformers_makes_of_it(shape, block, scale_dtype, tmp_path):
    dtype = getattr(torch, scale_dtype)
    powers = dtype in (torch.float8_e8m0fnu, torch.uint8)
    stored, scales, _ = fp8_block(random(*shape), block, powers=powers)
    scales = scales.to(torch.float8_e8m0fnu if powers else dtype)
    scales = scales.view(torch.uint8) if dtype == torch.uint8 else scales
    tensors = {"x.weight": stored, "x.weight_scale_inv": scales}
    described = {**FP8, "weight_block_size": list(block)}
    reader = open_model(folder_of(tmp_path / "model", tensors, described))
    exact = Fp8Dequantize(None)._dequantize_one(stored, scales, torch.bfloat16)
    assert torch.equal(reader.read("x.weight"), exact)
    assert torch.equal(reader.read("x.weight", 5), exact[5])
    with reader.opened() as lazy:
        assert torch.equal(lazy("x.weight")[31:70], exact[31:70])
    assert (
        b"".join(map(bytes, reader.chunks("x.weight"))) == exact.view(torch.uint8).numpy().tobytes()
    )


@pytest.mark.parametrize("shape", [(129, 127), (128, 130), (576, 200), (1, 1), (300, 5)])
def test_blocks_at_the_edges_are_smaller(shape, tmp_path, monkeypatch):
    monkeypatch.setattr("compressor.checkpoint.block_scales._AT_ONCE", 7 * shape[1])
    stored, scales, dense = fp8_block(random(*shape))
    tensors = {"x.weight": stored, "x.weight_scale_inv": scales}
    reader = open_model(folder_of(tmp_path / "model", tensors, FP8))
    assert torch.equal(reader.read("x.weight"), dense)
    with reader.opened() as lazy:
        for start in range(0, shape[0], 50):
            assert torch.equal(lazy("x.weight")[start : start + 50], dense[start : start + 50])


def test_other_spellings_of_eight_bits(tmp_path):
    stored, scales, dense = fp8_block(random(200, 150))
    powers = torch.tensor([[0.5, 2.0], [1.0, 0.25]])
    codes = torch.randint(256, (4, 32), generator=torch.Generator().manual_seed(1))
    tensors = {
        "deepseek4.weight": stored,
        "deepseek4.scale": scales,
        "mistral.weight": stored.clone(),
        "mistral.qscale_weight": scales.clone(),
        "experts.down_proj": torch.stack([stored[:128], stored[72:]]),
        "experts.down_proj_scale_inv": torch.stack([scales[:1], scales[1:]]),
        "four.weight": codes[:2].to(torch.uint8).view(torch.int8),
        "four.scale": powers.to(torch.float8_e8m0fnu),
        "norm.weight": random(200).half(),
        "clip.scale": random(3),
    }
    reader = open_model(folder_of(tmp_path / "model", tensors, FP8))
    assert reader.tensors.keys() == {
        *("deepseek4.weight", "mistral.weight", "experts.down_proj", "four.weight"),
        *("norm.weight", "clip.scale"),
    }
    assert torch.equal(reader.read("deepseek4.weight"), dense)
    assert torch.equal(reader.read("mistral.weight"), dense)
    assert torch.equal(reader.read("norm.weight"), tensors["norm.weight"])
    second = stored[72:].float() * scales[1:].repeat_interleave(128, 1)[:, :150]
    assert torch.equal(reader.read("experts.down_proj", 1), second.bfloat16())
    assert torch.equal(reader.read("experts.down_proj")[1], second.bfloat16())
    exact = Fp8Dequantize(None)._dequantize_one(
        tensors["four.weight"], tensors["four.scale"], torch.bfloat16
    )
    assert torch.equal(reader.read("four.weight"), exact)
    assert reader.config == {"model_type": "llama", "torch_dtype": "bfloat16"}


def test_one_scale_for_a_weight_and_none_for_what_enters(tmp_path):
    stored = random(20, 30).to(torch.float8_e4m3fn)
    tensors = {
        "x.weight": stored,
        "x.weight_scale_inv": torch.tensor(0.375),
        "x.activation_scale": torch.tensor(2.0),
        "experts.up_proj": torch.stack([stored, stored]),
        "experts.up_proj_scale_inv": torch.tensor([2.0, 3.0]),
    }
    described = {**FP8, "weight_block_size": None, "activation_scheme": "static"}
    reader = open_model(folder_of(tmp_path / "model", tensors, described))
    assert reader.tensors.keys() == {"x.weight", "experts.up_proj"}
    assert torch.equal(reader.read("x.weight"), (stored.float() * 0.375).bfloat16())
    assert torch.equal(reader.read("experts.up_proj", 1), (stored.float() * 3).bfloat16())


def test_mxfp4_is_what_transformers_makes_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr("compressor.checkpoint.mxfp4._AT_ONCE", 7 * 96)  # rows at once: 7
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (3, 40, 3, 16), generator=generator).to(torch.uint8)
    scales = torch.randint(1, 253, (3, 40, 3), generator=generator).to(torch.uint8)
    tensors = {"e.down_proj_blocks": blocks, "e.down_proj_scales": scales}
    reader = open_model(folder_of(tmp_path / "model", tensors, MXFP4))
    exact = convert_moe_packed_tensors(blocks, scales)
    assert reader.tensors["e.down_proj"].shape == exact.shape == (3, 96, 40)
    assert torch.equal(reader.read("e.down_proj"), exact)
    assert torch.equal(reader.read("e.down_proj", 2), exact[2])
    with reader.opened() as lazy:
        assert torch.equal(lazy("e.down_proj")[1:3], exact[1:3])
    assert reader.tensors["e.down_proj"].nbytes == exact.nbytes


def test_experts_of_four_bits_survive_the_way_there_and_back():
    weight = random(2, 64, 8)
    blocks, scales, dense = mxfp4(weight)
    assert torch.equal(convert_moe_packed_tensors(blocks, scales), dense)
    assert (dense.float() - weight).abs().max() < weight.abs().max() / 4


@pytest.mark.parametrize("options", [{}, {"ignore": ["*.0.*q_proj", "*down_proj"]}])
def test_block_fp8_is_pruned_as_its_dense_twin(options, ragged, rows, tmp_path):
    report = pruned(ragged / "fp8", rows, tmp_path / "out", **options)
    pruned(ragged / "twin", rows, tmp_path / "twin", **options)
    assert shards(tmp_path / "out") == shards(tmp_path / "twin")
    ours, theirs = [(tmp_path / n / "config.json").read_text() for n in ("out", "twin")]
    assert ours == theirs
    assert json.loads(ours)["quantization_config"]["quant_method"] == "compress-llm"
    note = "the model is quantised (fp8): 14 tensors are read as bfloat16 (F8_E4M3 with a scale for"
    assert report.notes[0].startswith(note)
    assert report.input_bytes == Reader(ragged / "twin").nbytes


@pytest.mark.parametrize("way", ["resumed", "two processes"])
def test_block_fp8_is_pruned_as_its_dense_twin_by_every_way(
    way, ragged, rows, tmp_path, monkeypatch
):
    monkeypatch.setattr("compressor.calibration.capture._BATCH_TOKENS", 64)
    pruned(ragged / "twin", rows, tmp_path / "twin")
    if way == "resumed":

        def kill(step, done, *_, **__):
            if step == "blocks" and done == 1:
                kill_me()

        killed = in_child(lambda: pruned(ragged / "fp8", rows, tmp_path / "out", progress=kill))
        assert killed == -signal.SIGKILL
        pruned(ragged / "fp8", rows, tmp_path / "out")
    else:
        codes, said = in_processes(2, lambda _: pruned(ragged / "fp8", rows, tmp_path / "out"))
        assert codes == [0, 0], said
    assert shards(tmp_path / "out") == shards(tmp_path / "twin")


@pytest.mark.parametrize(
    ("family", "scales"),
    [
        ("deepseek_v3", {}),
        ("minimax_m2", {"modules_to_not_convert": ["gate", "lm_head"]}),
        ("deepseek_v4", {"spelled": "scale", "scale_dtype": torch.float8_e8m0fnu}),
    ],
)
def test_mixtures_in_block_fp8_are_pruned_as_their_dense_twins(family, scales, rows, tmp_path):
    build(family, tmp_path / "dense")
    to_fp8(tmp_path / "dense", tmp_path / "fp8", tmp_path / "twin", (16, 16), **scales)
    options = {"ignore": ["*.1.*w2*" if family == "minimax_m2" else "*.1.*down_proj*"]}
    pruned(tmp_path / "fp8", rows, tmp_path / "out", **options)
    pruned(tmp_path / "twin", rows, tmp_path / "out-of-twin", **options)
    assert shards(tmp_path / "out") == shards(tmp_path / "out-of-twin")


def test_zeros_in_block_fp8_are_packed_as_those_of_its_dense_twin(ragged, rows, tmp_path):
    pruned(ragged / "dense", rows, tmp_path / "zeros", format="dense")
    to_fp8(tmp_path / "zeros", tmp_path / "fp8", tmp_path / "twin")
    done = pack(tmp_path / "fp8", tmp_path / "out")
    assert len(done.packed) == 14
    pack(tmp_path / "twin", tmp_path / "out-of-twin")
    assert shards(tmp_path / "out") == shards(tmp_path / "out-of-twin")


def test_zeros_in_place_leave_no_trace_of_the_old_form(ragged, rows, tmp_path):
    pruned(ragged / "fp8", rows, tmp_path / "out", format="dense", ignore=["*.1.*"])
    assert "quantization_config" not in json.loads((tmp_path / "out/config.json").read_text())
    stored = {}
    for path in (tmp_path / "out").glob("*.safetensors"):
        stored |= load_file(path)
    twin = Reader(ragged / "twin")
    assert stored.keys() == twin.tensors.keys()
    left = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(stored[left], twin.read(left))
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_a_shard_of_scales_alone_is_not_written(ragged, rows, tmp_path):
    shutil.copytree(ragged / "fp8", tmp_path / "model")
    index = json.loads((tmp_path / "model/model.safetensors.index.json").read_text())
    scales = {}
    for path in (tmp_path / "model").glob("*.safetensors"):
        tensors = load_file(path)
        scales |= {name: tensors.pop(name) for name in [*tensors] if name.endswith("_scale_inv")}
        save_file(tensors, path, {"format": "pt"})
    save_file(scales, tmp_path / "model/scales.safetensors")
    index["weight_map"] |= dict.fromkeys(scales, "scales.safetensors")
    (tmp_path / "model/model.safetensors.index.json").write_text(json.dumps(index))
    pruned(tmp_path / "model", rows, tmp_path / "out")
    pruned(ragged / "twin", rows, tmp_path / "twin")
    assert shards(tmp_path / "out") == shards(tmp_path / "twin")


@pytest.mark.parametrize("kind", ["ragged", "oss"])
def test_loads_as_its_dense_twin(kind, request):
    folder = request.getfixturevalue(kind)
    quantised = folder / ("fp8" if kind == "ragged" else "mxfp4")
    ours, twin = (compressor.runtime.load(one) for one in (quantised, folder / "twin"))
    with torch.no_grad():
        assert torch.equal(ours(IDS).logits, twin(IDS).logits)
    assert not hasattr(ours.config, "quantization_config")


def test_every_command_takes_it(ragged, rows, cli, tmp_path):
    source, small = ragged / "fp8", ("--num-samples", 8, "--seq-len", 32)
    told = "note: the model is quantised (fp8): 14 tensors are read as bfloat16"
    dry = cli("prune", source, "-o", tmp_path / "out", "--dataset", rows, *small, "--dry-run")
    assert told in dry.stderr
    assert not (tmp_path / "out").exists()
    cli("plan", source, "--output", tmp_path / "plan.toml", "--ratios", "owl", "--pattern", "50%",
        "--dataset", rows, *small)  # fmt: skip
    cli("lowrank", source, "-o", tmp_path / "low", "--keep", "70%", "--dataset", rows, *small)
    assert "is sound" in cli("verify", tmp_path / "low").stdout
    found = json.loads(cli("inspect", source, "--json").stdout)
    rows_of = {row["name"]: row for row in found["linears"]}
    up = rows_of["model.layers.0.mlp.up_proj"]
    assert (up["format"], up["shape"]) == ("fp8", [300, 160])
    assert up["bytes"] == 300 * 160 + 4 * 3 * 2
    assert up["dense_bytes"] == 2 * 300 * 160
    assert found["bytes"] == Reader(source).nbytes
    assert found["dense_bytes"] == Reader(ragged / "twin").nbytes
    scores = [
        json.loads(cli("eval", one, "--dataset", rows, "--seq-len", 32, "--json").stdout)
        for one in (source, ragged / "twin")
    ]
    results = [score["results"] for score in scores]
    assert results[0] == results[1]


def broken(tensors, **changed):
    """The tensors with others in place; None takes one away."""
    return {name: t for name, t in {**tensors, **changed}.items() if t is not None}


def block_fp8():
    stored, scales, _ = fp8_block(random(200, 150))
    return {"x.weight": stored, "x.weight_scale_inv": scales, "n.weight": random(4)}


def four_bits():
    blocks, scales, _ = mxfp4(random(2, 64, 8))
    return {"x_blocks": blocks, "x_scales": scales, "n.weight": random(4)}


SCALE = "x.weight_scale_inv"
FP8_FAULTS = {
    "no scale": ({SCALE: None}, "x.weight is stored as F8_E4M3, and its scales are not there"),
    "no weight": ({"x.weight": None}, f"{SCALE} holds scales, but x.weight is not there"),
    "dense": (
        {"x.weight": random(200, 150)},
        f"{SCALE} holds scales, but x.weight is stored as F32",
    ),
    "shape": (
        {SCALE: torch.ones(1, 2)},
        r"x.weight_scale_inv has shape \[1, 2\]; x.weight \[200, 150\]",
    ),
    "dtype": ({SCALE: torch.ones(2, 2).double()}, "x.weight_scale_inv is stored as F64"),
    "e5m2": ({"x.weight": torch.ones(200, 150).to(torch.float8_e5m2)}, r"x.weight \(F8_E5M2 "),
    "empty": (
        {"x.weight": torch.ones(0, 150).to(torch.float8_e4m3fn)},
        "x.weight has shape .* empty",
    ),
    "stacked": (
        {"x.weight": torch.ones(2, 200, 150).to(torch.float8_e4m3fn), SCALE: torch.ones(2, 2, 2)},
        "where its blocks of 128 rows begin",
    ),
}
MXFP4_FAULTS = {
    "no scale": ({"x_scales": None}, "x_blocks is there, and x_scales is not"),
    "no blocks": ({"x_blocks": None}, "x_scales is there, and x_blocks is not"),
    "shape": (
        {"x_scales": torch.ones(2, 8, 3).byte()},
        r"x_scales is U8 \[2, 8, 3\]; U8 \[2, 8, 2\]",
    ),
    "matrix": (
        {"x_blocks": torch.ones(8, 2, 16).byte()},
        r"x_blocks is U8 \[8, 2, 16\]; U8 \[experts",
    ),
    "twice": ({"x": random(2, 64, 8)}, "x is there twice"),
    "dtype": ({"x_scales": torch.ones(2, 8, 2)}, "x_scales is F32"),
}


@pytest.mark.parametrize("fault", FP8_FAULTS)
def test_what_does_not_belong_together_is_told(fault, tmp_path):
    changed, message = FP8_FAULTS[fault]
    with pytest.raises(CheckpointError, match=message):
        open_model(folder_of(tmp_path / "model", broken(block_fp8(), **changed), FP8))


@pytest.mark.parametrize("fault", MXFP4_FAULTS)
def test_what_does_not_belong_together_is_told_of_mxfp4(fault, tmp_path):
    changed, message = MXFP4_FAULTS[fault]
    with pytest.raises(CheckpointError, match=message):
        open_model(folder_of(tmp_path / "model", broken(four_bits(), **changed), MXFP4))


def test_a_block_size_that_is_none_is_told(tmp_path):
    described = {**FP8, "weight_block_size": [128, 0]}
    with pytest.raises(CheckpointError, match=r"weight_block_size is \[128, 0\]"):
        open_model(folder_of(tmp_path / "model", block_fp8(), described))


@pytest.mark.parametrize("kind", ["fp8", "mxfp4"])
def test_a_scale_that_is_no_number_ends_a_run_before_any_work(
    kind, ragged, oss, rows, cli, tmp_path
):
    shutil.copytree((ragged if kind == "fp8" else oss) / kind, tmp_path / "model")
    for path in sorted((tmp_path / "model").glob("*.safetensors")):
        tensors = load_file(path)
        name = next((n for n in tensors if n.endswith(("_scale_inv", "_scales"))), None)
        if name:
            tensors[name].view(-1)[-1] = 255 if kind == "mxfp4" else float("nan")
            save_file(tensors, path, {"format": "pt"})
            break
    small = ("--dataset", rows, "--num-samples", 8, "--seq-len", 32)
    error = cli("prune", tmp_path / "model", "-o", tmp_path / "out", *small, code=1).stderr
    assert f"{name} holds NaN: its weight cannot be known" in error
    assert not (tmp_path / "out").exists()
    assert f"{name} holds NaN" in cli("verify", tmp_path / "model", code=1).stdout


@pytest.mark.parametrize("method", ["gptq", "awq", "bitsandbytes", "compressed-tensors"])
def test_other_forms_are_refused_with_the_way_out(method, rows, tmp_path):
    folder = build("llama", tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    inside = {"quantization_config": {"quant_method": method}}
    for where in ({**config, **inside}, {**config, "text_config": {**config, **inside}}):
        (folder / "config.json").write_text(json.dumps(where))
        with pytest.raises(CheckpointError, match=rf"\({method}\).* give the original checkpoint"):
            pruned(folder, rows, tmp_path / "out")
