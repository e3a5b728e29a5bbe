"""Shared fixtures: tiny random models of many families, the model that ships with the demo, and the optional canaries."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "demo" / "books-1m"
SHARED = Path(os.environ.get("COMPRESS_SHARED", ROOT.parent / "shared"))

_LLAMA = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
)
FAMILIES = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": {**_LLAMA, "head_dim": 16},
    "gemma2": {**_LLAMA, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "phi3": {**_LLAMA, "pad_token_id": 0},
    "opt": dict(
        hidden_size=64,
        ffn_dim=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        word_embed_proj_dim=64,
        max_position_embeddings=256,
        pad_token_id=1,
    ),
    "gpt_neox": dict(hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=256),
    "falcon": dict(
        hidden_size=64, num_hidden_layers=3, num_attention_heads=4, num_kv_heads=2, new_decoder_architecture=True, alibi=False
    ),
    "gpt2": dict(n_embd=64, n_layer=3, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=1),
}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    os.environ["COMPRESS_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def demo_model() -> Path:
    return DEMO


@pytest.fixture(scope="session")
def canaries() -> Path:
    if not (SHARED / "models").is_dir():
        pytest.skip("the canary models are not here; COMPRESS_SHARED names their folder")
    return SHARED


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A function: family -> folder of a tiny random bf16 checkpoint in several shards."""
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            from transformers import AutoConfig, AutoModelForCausalLM

            torch.manual_seed(0)
            config = AutoConfig.for_model(family, vocab_size=128, **FAMILIES[family])
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(torch.randn_like(parameter) * 0.05)
            made[family] = tmp_path_factory.mktemp(family)
            model.save_pretrained(made[family], max_shard_size="60KB")
        return made[family]

    return make


@pytest.fixture(scope="session")
def rows(tmp_path_factory) -> Path:
    """Eight calibration rows of 32 ids below 128."""
    ids = torch.randint(3, 128, (8, 32), generator=torch.Generator().manual_seed(1))
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(f'{{"input_ids": {row}}}\n' for row in ids.tolist()))
    return path


@pytest.fixture
def cli(monkeypatch, capfd):
    """Run the command line in this process, as `main` would in its own; returns code, stdout and stderr."""
    from compressor.cli import main

    def run(*arguments: object, code: int = 0) -> SimpleNamespace:
        monkeypatch.setattr(sys, "argv", ["compress", *map(str, arguments)])
        handler = signal.getsignal(signal.SIGTERM)
        capfd.readouterr()
        ended = 0
        try:
            main()
        except SystemExit as end:
            ended = end.code or 0
        finally:
            signal.signal(signal.SIGTERM, handler)
        printed = capfd.readouterr()
        assert ended == code, f"exit {ended}, expected {code}\n{printed.out}\n{printed.err}"
        return SimpleNamespace(stdout=printed.out, stderr=printed.err)

    return run
