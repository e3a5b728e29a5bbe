"""A real vLLM engine serves packed folders and says what `compressor.load` says.

`make test-vllm` runs these in an environment of their own; elsewhere they are skipped.
"""

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from tests.vllm.folders import pack_folder

if find_spec("vllm") is None:
    pytest.skip("vLLM is not installed: `make test-vllm` does it", allow_module_level=True)

pytestmark = pytest.mark.timeout(2400)  # engines start slowly where many things run

ROOT = Path(__file__).parents[2]
DEMO = ROOT / "demo" / "books-1m"
MIXED = {
    "q_proj": "sparse24",
    "k_proj": "lowrank",
    "v_proj": None,
    "o_proj": "armor",
    "gate_proj": "sparse24",
    "up_proj": "sparse24",
    "down_proj": "armor",
}
"""All forms and a dense linear, three of them in the fused q, k and v."""


def leaf(linear):
    return linear.rpartition(".")[2]


def in_blocks(form):
    return lambda linear: form if ".layers." in linear else None


def wide(linear):
    return None if leaf(linear) in ("k_proj", "v_proj") else in_blocks("armor")(linear)


def output_in_armor(linear):
    return in_blocks("armor" if leaf(linear) == "o_proj" else "sparse24")(linear)


def in_gpt2(linear):
    return "sparse24" if ".h." in linear else None


def in_mixture(linear):
    """Experts of two forms; the router stays dense."""
    form = "armor" if ".experts.1." in linear else "sparse24"
    return None if leaf(linear) == "gate" else in_blocks(form)(linear)


def random_model(model, folder):
    """Save a random bf16 model whose predictions are not all alike, with the demo's tokenizer."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.normal_(0, 0.06, generator=generator)
    model.to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (folder / name).write_bytes((DEMO / name).read_bytes())
    return folder


def phi3(folder):
    """Fused on disk: qkv_proj and gate_up_proj are one tensor each."""
    config = Phi3Config(
        vocab_size=4096, hidden_size=128, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    return random_model(Phi3ForCausalLM(config), folder)


def gpt2(folder):
    """Stored [in, out]."""
    config = GPT2Config(vocab_size=4096, n_embd=128, n_layer=2, n_head=2, n_positions=256)
    return random_model(GPT2LMHeadModel(config), folder)


def mixture(folder):
    config = Qwen3MoeConfig(
        vocab_size=4096, hidden_size=128, intermediate_size=192, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32, moe_intermediate_size=64,
        num_experts=4, num_experts_per_tok=2, norm_topk_prob=True,
    )  # fmt: skip
    return random_model(Qwen3MoeForCausalLM(config), folder)


def without(folder, out, name):
    """A copy of a packed folder that lacks a tensor."""
    return changed(folder, out, lambda tensors: tensors.pop(name))


def changed(folder, out, change):
    out.mkdir()
    for path in folder.iterdir():
        (out / path.name).write_bytes(path.read_bytes())
    tensors = load_file(out / "model.safetensors")
    change(tensors)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def damage(tensors):
    tensors["model.layers.1.mlp.up_proj.weight_metadata"][3, 0] = 0


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Plain checkpoints and packed ones, by name."""
    at = tmp_path_factory.mktemp("folders")
    makers = {"phi3": phi3, "gpt2": gpt2, "mixture": mixture}
    plain = {name: make(at / f"plain-{name}") for name, make in makers.items()}
    made = {"plain": DEMO}
    for name, form_of in (
        ("sparse24", in_blocks("sparse24")),
        ("armor", in_blocks("armor")),
        ("mixed", lambda linear: MIXED.get(leaf(linear))),
    ):
        made[name] = pack_folder(DEMO, at / name, form_of)
    made["wide"] = pack_folder(DEMO, at / "wide", wide, blocks=(128, 128))
    made["phi3"] = pack_folder(plain["phi3"], at / "phi3", output_in_armor)
    made["gpt2"] = pack_folder(plain["gpt2"], at / "gpt2", in_gpt2, transposed=True)
    made["mixture"] = pack_folder(plain["mixture"], at / "mixture", in_mixture)
    norm = "model.layers.2.post_attention_layernorm.weight"
    made["no norm"] = without(made["sparse24"], at / "no-norm", norm)
    factor = "model.layers.2.self_attn.k_proj.weight_values"
    made["no values"] = without(made["sparse24"], at / "no-values", factor)
    expert = "model.layers.1.mlp.experts.2.up_proj.weight_metadata"
    made["no expert"] = without(made["mixture"], at / "no-expert", expert)
    made["damaged"] = changed(made["sparse24"], at / "damaged", damage)
    return made


def engine(cases, at, **environment):
    """Start `serve.py` on the cases and wait for its answers."""
    asked = at / "cases.json"
    asked.write_text(json.dumps(cases))
    script = Path(__file__).with_name("serve.py")
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [sys.executable, script, asked, at / "answers.json"],
        capture_output=True, text=True, env=variables, cwd=at, timeout=1800, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((at / "answers.json").read_text()), done.stdout + done.stderr


def case(name, folder, runtime="auto", **options):
    return {"name": name, "folder": str(folder), "runtime": runtime, "options": options}


@pytest.fixture(scope="session")
def served(folders, tmp_path_factory):
    """The answers of one engine process to every folder, and what it printed."""
    cases = [
        *(case(name, folders[name]) for name in folders),
        *(
            case(f"{name} packed", folders[name], "packed")
            for name in ("sparse24", "armor", "mixed", "phi3", "gpt2", "damaged", "no values")
        ),
        case("mixed compiled", folders["mixed"], enforce_eager=False),
        case("mixed packed compiled", folders["mixed"], "packed", enforce_eager=False),
        case("mixed transformers", folders["mixed"], model_impl="transformers"),
        case("mixed dummy", folders["mixed"], "packed", load_format="dummy"),
        case("mixture dummy", folders["mixture"], load_format="dummy"),
    ]
    at = tmp_path_factory.mktemp("engine")
    return engine(cases, at, VLLM_CACHE_ROOT=str(at / "cache"))


@pytest.fixture(scope="session")
def loaded(folders):
    """A function: name of a folder -> the model as `compressor.load` gives it, in float32."""
    import compressor

    models = {}

    def load(name):
        if name not in models:
            models[name] = compressor.load(folders[name], dtype=torch.float32)
        return models[name]

    return load


@torch.no_grad()
def agree(answers, model):
    """Greedy tokens are equal, log probabilities within 1e-4."""
    assert isinstance(answers, list), answers["error"]
    for row in answers:
        ids = torch.tensor([row["prompt"] + row["tokens"]])
        logprobs = model(ids).logits[0, len(row["prompt"]) - 1 : -1].float().log_softmax(-1)
        assert logprobs.argmax(-1).tolist() == row["tokens"]
        own = logprobs.gather(1, torch.tensor(row["tokens"])[:, None]).flatten()
        torch.testing.assert_close(torch.tensor(row["logprobs"]), own, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "name",
    [
        "sparse24", "sparse24 packed", "armor", "armor packed", "wide", "mixed", "mixed packed",
        "mixed compiled", "mixed packed compiled", "mixed transformers", "phi3", "phi3 packed",
        "gpt2", "gpt2 packed", "mixture", "plain",
    ],
)  # fmt: skip
def test_serves_what_is_loaded(served, loaded, name):
    agree(served[0][name], loaded(name.split()[0]))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("no norm", "model.layers.2.post_attention_layernorm.weight"),
        ("no values", "lacks model.layers.2.self_attn.k_proj.weight_values: its copy is not"),
        ("no values packed", "lacks model.layers.2.self_attn.k_proj.weight_values"),
        ("no expert", "lacks tensors of model.layers.1.mlp.experts.2"),
        ("damaged", "model.layers.1.mlp.up_proj is damaged: metadata of row 3"),
        ("damaged packed", "model.layers.1.mlp.up_proj is damaged: metadata of row 3"),
    ],
)  # fmt: skip
def test_what_is_not_whole_is_refused_by_name(served, name, reason):
    answers = served[0][name]
    assert isinstance(answers, dict), "it was served"
    assert reason in answers["error"].rstrip().splitlines()[-1]


def test_without_weights_it_runs(served):
    assert isinstance(served[0]["mixed dummy"], list)
    assert isinstance(served[0]["mixture dummy"], list)


def test_two_ranks_hold_their_shares(folders, loaded, tmp_path):
    """q, k and v are split by heads, of which k and v have one for both ranks; o and down by their
    inputs.
    """
    cases = [case("mixed", folders["mixed"], "packed", tensor_parallel_size=2)]
    cases.append(case("wide", folders["wide"], "packed", tensor_parallel_size=2))
    answers, printed = engine(cases, tmp_path, VLLM_CPU_OMP_THREADS_BIND="0|1")
    agree(answers["mixed"], loaded("mixed"))
    agree(answers["wide"], loaded("wide"))
    # a share of 64 rows is half a block of A: that linear is unpacked, and a line says so
    line = "layers.0.self_attn.q_proj is unpacked to a dense weight on each rank"
    assert line in printed
    assert "which do not divide [64, 128]" in printed


BROKEN = "raise ImportError('this package is broken')"


def test_plain_models_are_served_as_ever_with_a_broken_plug_in(served, tmp_path):
    (tmp_path / "compressor").mkdir()
    (tmp_path / "compressor" / "__init__.py").write_text(BROKEN)
    answers, printed = engine([case("plain", DEMO)], tmp_path, PYTHONPATH=str(tmp_path))
    assert "this package is broken" in printed
    assert answers["plain"] == served[0]["plain"]


def test_a_format_of_a_later_version_is_refused(folders):
    from compressor.errors import CheckpointError
    from compressor.runtime.vllm_plugin.config import CompressConfig

    config = json.loads((folders["sparse24"] / "config.json").read_text())["quantization_config"]
    with pytest.raises(CheckpointError, match="version 2"):
        CompressConfig.from_config({**config, "version": 2})


def test_registers_more_than_once_and_old_versions_are_told_so(monkeypatch, caplog):
    import vllm
    from vllm.model_executor.layers.quantization import get_quantization_config

    from compressor.runtime.vllm_plugin import register
    from compressor.runtime.vllm_plugin.config import CompressConfig

    register()
    register()
    assert get_quantization_config("compress-llm") is CompressConfig
    monkeypatch.setattr(vllm, "__version__", "0.31.2")
    warnings = []
    monkeypatch.setattr(
        "logging.Logger.warning", lambda log, text, *rest: warnings.append(text % rest)
    )
    register()
    assert warnings == [
        "compress-llm serves packed checkpoints with vLLM 0.32 or newer, this is 0.31.2"
    ]


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


@pytest.fixture
def endpoint(folders, tmp_path):
    """URL of an OpenAI-compatible server of the mixed folder."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    options = [
        "--dtype", "float32", "--enforce-eager", "--max-model-len", "160", "--max-num-seqs", "4",
        "--no-enable-prefix-caching",
    ]  # fmt: skip
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--port", str(port)]
    log = tmp_path / "server.log"
    with log.open("w") as file:
        server = subprocess.Popen(
            [*command, "--model", str(folders["mixed"]), *options],
            stdout=file,
            stderr=file,
            cwd=tmp_path,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_CPU_KVCACHE_SPACE": "1"},
        )
    try:
        for _ in range(1200):
            assert server.poll() is None, log.read_text()
            try:
                urllib.request.urlopen(f"{url}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(1)
        yield url
    finally:
        server.terminate()
        server.wait(60)


def test_the_endpoint_answers_and_its_perplexity_is_the_folders(
    endpoint, folders, loaded, tmp_path
):
    body = {"model": str(folders["mixed"]), "prompt": [5, 6, 7, 8], "max_tokens": 8}
    body |= {"temperature": 0, "ignore_eos": True, "return_token_ids": True}
    request = urllib.request.Request(
        f"{endpoint}/v1/completions",
        json.dumps(body).encode(),
        {"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        (choice,) = json.load(response)["choices"]
    ids = torch.tensor([[5, 6, 7, 8, *choice["token_ids"]]])
    with torch.no_grad():
        greedy = loaded("mixed")(ids).logits[0, 3:-1].argmax(-1)
    assert greedy.tolist() == choice["token_ids"]

    rows = torch.randint(3, 4000, (6, 128), generator=torch.Generator().manual_seed(0)).tolist()
    text = tmp_path / "rows.jsonl"
    text.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    scored = subprocess.run(
        [sys.executable, "-m", "compressor", "eval", folders["mixed"], "--dataset", text,
         "--dtype", "float32", "--server", endpoint, "--json", "-q"],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert scored.returncode == 0, scored.stderr
    result = json.loads(scored.stdout)
    own = result["results"]["rows"]["token_perplexity,none"]
    served = result["served"]["results"]["rows"]["token_perplexity,none"]
    assert served == pytest.approx(own, rel=1e-3)
