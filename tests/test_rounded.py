"""The baseline rounded to int4 and int3: which weights change and to what, what it is beside the
others, what is refused.
"""

import json

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

import compressor
from compressor.checkpoint.reader import Reader
from compressor.errors import UsageError
from compressor.evaluation import DIVERGENCE, METRIC, candidate, split_baselines
from compressor.evaluation.rounded import GRIDS, round_blocks
from compressor.model.skeleton import Skeleton
from compressor.quantisation import gptq, nearest
from compressor.stats import collecting

IDS = torch.randint(3, 128, (8, 32), generator=torch.Generator().manual_seed(1))  # those of `rows`


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("COMPRESS_CACHE", str(tmp_path / "cache"))


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def rounded(folder, grid, ids=None):
    model = load(folder)
    round_blocks(model, Skeleton(Reader(folder), dtype=torch.float32), GRIDS[grid], ids)
    return model.state_dict()


@pytest.mark.parametrize("grid", ["int4", "int3"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_every_linear_of_the_blocks_is_rounded_and_nothing_else(family, grid, tiny):
    model, found = load(tiny(family)), rounded(tiny(family), grid)
    linears = {
        f"{name}.weight": isinstance(module, Conv1D)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and name != "lm_head"
    }
    assert len(linears) == (21 if family == "llama" else 12)
    for name, weight in model.state_dict().items():
        if name in linears:
            turned = weight.T if linears[name] else weight
            expected = nearest(turned.bfloat16(), GRIDS[grid])  # as it is stored
            weight = (expected.T if linears[name] else expected).float()
        assert torch.equal(found[name], weight), name


@torch.no_grad()
def test_gptq_sees_the_inputs_that_the_rounded_blocks_before_give(tiny):
    """Against whole forward passes of the model, a block rounded after each."""
    model, found = load(tiny("llama")), rounded(tiny("llama"), "int3", IDS)
    for index, block in enumerate(model.model.layers):
        linears = {
            name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)
        }
        with collecting(linears, gram=True) as stats:
            model(IDS)
        for name, module in linears.items():
            weight = gptq(module.weight.bfloat16(), stats[name], GRIDS["int3"]).float()
            ours = found[f"model.layers.{index}.{name}.weight"]
            # a number that other sums of the Gram matrix round apart turns the rest of its row
            assert (ours == weight).float().mean() > 0.95, (index, name)
            module.weight.copy_(ours)


def test_experts_are_rounded_those_without_a_token_to_the_nearest(tiny):
    folder = tiny("mixtral")
    skeleton = Skeleton(Reader(folder))
    names = {
        linear.parameter
        for index in range(len(skeleton.blocks))
        for linear in skeleton.linears(index)
        if linear.experts
    }
    assert names
    before = load(folder).state_dict()
    plain, calibrated = rounded(folder, "int4"), rounded(folder, "int4", IDS[:1, :2])
    same = []
    for name in names:
        assert not torch.equal(plain[name], before[name])
        same += [torch.equal(*pair) for pair in zip(plain[name], calibrated[name], strict=True)]
    assert any(same)  # two tokens do not reach every expert of every block
    assert not all(same)


def test_both_ways_stand_beside_the_models_and_nothing_is_written(cli, demo_model, rows, tmp_path):
    out = tmp_path / "out"
    compressor.prune(demo_model, out, method="magnitude")
    before = sorted(path.name for path in tmp_path.iterdir())
    command = ["eval", out, "--baseline", demo_model, "--baseline", "int4", "--dataset", rows]
    command += ["--calibration", rows, "--calibration-samples", 8, "--seq-len", 32, "-q"]
    table = cli(*command).stdout
    heads = [cell.strip() for cell in table.splitlines()[0].split("|")[2:-1]]
    assert heads == ["books-1m", "int4 nearest", "int4 GPTQ", "out"]
    found = json.loads(cli(*command, "--json").stdout)
    assert set(found["rounded"]) == {"int4 nearest", "int4 GPTQ"}
    for scores in found["rounded"].values():
        assert scores["config"]["linear_bytes"] == 786432 * (4 + 20 / 64) / 8
        assert scores["results"]["rows"][METRIC] > 1
        assert 0 < scores["results"]["rows"][DIVERGENCE] < found["results"]["rows"][DIVERGENCE]
    assert len({scores["digest"] for scores in found["rounded"].values()}) == 2
    assert sorted({path.name for path in tmp_path.iterdir()} - {"cache"}) == sorted(
        {*before, "out.eval.json"} - {"cache"}
    )


def test_what_is_known_of_it_is_kept(demo_model, rows, monkeypatch):
    asked = {"dataset": rows, "calibration": rows, "seq_len": 32, "calibration_samples": 8}
    first = compressor.evaluate(demo_model, baseline="int3", **asked)
    assert list(first) == [str(demo_model), "int3 nearest", "int3 GPTQ"]
    monkeypatch.setattr(candidate, "load_model", None)
    monkeypatch.setattr("compressor.evaluation.rounded.load_model", None)
    again = compressor.evaluate(demo_model, baseline="int3", **asked)
    assert [each["results"] for each in again.values()] == [
        each["results"] for each in first.values()
    ]


def test_its_own_text_is_not_the_one_that_is_scored(demo_model, monkeypatch):
    written, real = [], candidate.tokens.sample_from_model

    def sample(folder, **asked):
        written.append(asked["seed"])
        return real(folder, **asked)

    monkeypatch.setattr(candidate.tokens, "sample_from_model", sample)
    candidate.own_text.cache_clear()
    for seed in (0, 1):
        compressor.evaluate(
            demo_model, baseline="int4", dataset="self", seed=seed, num_samples=2, seq_len=16,
            calibration_samples=3,
        )  # fmt: skip
    assert written == [0, 1, 1, 0]


def test_which_model_is_meant():
    assert split_baselines([], ["a", "b"]) == (None, ())
    assert split_baselines(["m"], ["a"]) == ("m", ())
    assert split_baselines(["int4", "m", "int3", "int4"], ["a"]) == ("m", ("int4", "int3"))
    assert split_baselines(["int4"], ["a"]) == ("a", ("int4",))
    with pytest.raises(UsageError, match="names 2 models, m and n; accepted: one"):
        split_baselines(["m", "n"], ["a"])
    with pytest.raises(UsageError, match="say which it is"):
        split_baselines(["int4"], ["a", "b"])


def test_what_is_compressed_already_is_refused(made, rows):
    with pytest.raises(UsageError, match="give the original"):
        compressor.evaluate(made, baseline="int4", dataset=rows)
    with pytest.raises(UsageError, match="calibration_samples"):
        compressor.evaluate(made, baseline="int4", dataset=rows, calibration_samples=0)
