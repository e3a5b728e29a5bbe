"""Models whose blocks are hard to take apart, from their published form to a folder that loads:
every method, a run that is killed, two processes, and unpacked again.

Per-layer inputs and shared keys (Gemma 4 E2B), indices that one block makes for others (GLM-5), a
router's states that travel (Zaya), a multimodal model with linear attention (Qwen3.5), experts in
MXFP4 (gpt-oss).
"""

import signal

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import compressor.runtime
from compressor.checkpoint.reader import Reader
from compressor.config.recipe import Recipe
from compressor.run.pipeline import prune
from compressor.tools.unpack import unpack
from compressor.tools.verify import verify
from tests.families import build
from tests.quantised_folders import to_mxfp4
from tests.test_distributed import in_processes
from tests.test_resume import contents, in_child, kill_me
from tests.wrappers import build_wrapper

IDS = torch.randint(3, 96, (2, 24), generator=torch.Generator().manual_seed(0))
FAMILIES = ["gemma4", "glm_moe_dsa", "zaya", "qwen3_5", "gpt_oss"]
ARMOR = {"block_size": 8, "overhead": 0.9, "iterations": 1, "finish": 0}
METHODS = {
    "wanda": {"method": "wanda"},
    "armor": {"method": "armor", "options": ARMOR},
    "lowrank": {"method": "svd_llm", "keep": "60%"},
}
EACH_METHOD = [m if m == "wanda" else pytest.param(m, marks=pytest.mark.slow) for m in METHODS]


@pytest.fixture(autouse=True)
def several_batches(monkeypatch):
    monkeypatch.setattr("compressor.calibration.capture._BATCH_TOKENS", 64)


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory):
    """A function: family -> its checkpoint, and the dense one that it stands for."""
    made = {}

    def make(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            if family == "gpt_oss":
                to_mxfp4(build(family, folder / "dense"), folder / "model", folder / "twin")
            elif family in ("gemma4", "qwen3_5"):
                build_wrapper(family, folder / "model")
            else:
                build(family, folder / "model", torch.float32)
            twin = folder / "twin"
            made[family] = folder / "model", twin if twin.exists() else folder / "model"
        return made[family]

    return make


def recipe(folder, rows, method="wanda"):
    return Recipe(str(folder), dataset=str(rows), num_samples=8, seq_len=32, **METHODS[method])


def tensors_of(folder):
    return {
        name: tensor
        for path in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(path).items()
    }


@torch.no_grad()
def score(model):
    return model.eval()(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("method", EACH_METHOD)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_ends_in_a_folder_that_loads(family, method, folder_of, rows, tmp_path):
    folder, twin = folder_of(family)
    report = prune(recipe(folder, rows, method), tmp_path / "out")
    forms = {row.format for row in report.linears}
    assert forms <= ({"pivot", "dense"} if method == "lowrank" else {"sparse24", method})
    assert not verify(tmp_path / "out")["problems"]
    unpack(tmp_path / "out", tmp_path / "plain")
    assert Reader(tmp_path / "plain").config == Reader(twin).config
    plain, before = tensors_of(tmp_path / "plain"), tensors_of(twin)
    assert plain.keys() == before.keys()
    changed = {name for name in before if not torch.equal(plain[name], before[name])}
    in_one = {f"{row.name.rpartition('.experts.')[0]}.experts" for row in report.linears}
    own = {f"{row.name}.weight" for row in report.linears}
    assert changed
    assert all(name in own or name.rpartition(".")[0] in in_one for name in changed)
    whole, info = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", output_loading_info=True)
    assert not info["missing_keys"]
    packed = score(compressor.runtime.load(tmp_path / "out"))
    assert torch.isfinite(packed).all()
    if whole.dtype == torch.float32:
        torch.testing.assert_close(packed, score(whole), rtol=0, atol=1e-4)


@pytest.mark.parametrize("method", EACH_METHOD)
@pytest.mark.parametrize("family", FAMILIES)
def test_killed_in_every_block_it_ends_with_the_same_bytes(
    family, method, folder_of, rows, tmp_path
):
    job = recipe(folder_of(family)[0], rows, method)
    prune(job, tmp_path / "whole")

    def killed_in(block):
        def kill(step, done, *_, **__):
            if step == "blocks" and done == block:
                kill_me()

        return in_child(lambda: prune(job, tmp_path / "out", progress=kill))

    assert killed_in(1) == killed_in(3) == -signal.SIGKILL
    assert prune(job, tmp_path / "out").run["resumed_at_block"] in (2, 3)  # one may be unfinished
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


@pytest.mark.parametrize("method", EACH_METHOD)
@pytest.mark.parametrize("family", FAMILIES)
def test_two_processes_give_the_bytes_of_one(family, method, folder_of, rows, tmp_path):
    job = recipe(folder_of(family)[0], rows, method)
    codes, said = in_processes(2, lambda rank: prune(job, tmp_path / "two"))
    assert codes == [0, 0], said
    prune(job, tmp_path / "one")
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
