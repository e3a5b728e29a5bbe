"""Of a Hub id only what a run needs is fetched: the index first, then its shards, of one commit."""

import json
import os
import subprocess
import sys

import pytest
from safetensors.torch import load_file, save_file

from compressor.checkpoint.reader import INDEX, SINGLE
from tests.conftest import DEMO
from tests.hub_server import TOKEN, Repo, running

RESOLVE = """
import sys
from compressor.checkpoint.download import resolve
from compressor.checkpoint.reader import Reader
reader = Reader(resolve("tester/base"))
print(*sorted(str(p.relative_to(reader.folder)) for p in reader.folder.rglob("*") if p.is_file()))
"""
OTHERS = {
    "consolidated.safetensors": b"x" * 100,
    "original/model.safetensors": b"x" * 100,
    "original/params.json": b"{}",
    "original/tokenizer.model": b"x",
    "model.fp16.safetensors": b"x" * 100,
    "pytorch_model.bin": b"x",
    "onnx/model.onnx": b"x",
    "trainer_state.json": b"{}",
    "additional_chat_templates/tool.jinja": b"{{ tools }}",
}


@pytest.fixture
def hub():
    with running() as hub:
        files = {path.name: path.read_bytes() for path in DEMO.iterdir()}
        hub.repos["tester/base"] = Repo()
        hub.repos["tester/base"].commits[0]["files"] = files | OTHERS
        yield hub


def fetch(hub, tmp_path):
    own = {
        "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": TOKEN,
        "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip
    env = {key: value for key, value in os.environ.items() if "OFFLINE" not in key} | own
    done = subprocess.run([sys.executable, "-c", RESOLVE], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


BESIDE = {
    "config.json", "generation_config.json", "special_tokens_map.json", "tokenizer.json",
    "tokenizer_config.json", "additional_chat_templates/tool.jinja",
}  # fmt: skip


def in_shards(files, tmp_path):
    tensors = load_file(DEMO / SINGLE)
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2]), 1):
        shard = f"model-0000{number}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, tmp_path / shard)
        files[shard] = (tmp_path / shard).read_bytes()
        weight_map |= dict.fromkeys(part, shard)
    files[INDEX] = json.dumps({"metadata": {}, "weight_map": weight_map}).encode()
    return set(weight_map.values())


def test_the_shards_of_the_index_and_no_others(hub, tmp_path):
    files = hub.repos["tester/base"].commits[0]["files"]
    shards = in_shards(files, tmp_path)
    del files[SINGLE]
    files["model-00003-of-00009.safetensors"] = b"x"
    assert fetch(hub, tmp_path) == BESIDE | shards | {INDEX}
    assert fetch(hub, tmp_path) == BESIDE | shards | {INDEX}  # from the cache


def test_a_single_file_and_not_the_shards_beside_it(hub, tmp_path):
    in_shards(hub.repos["tester/base"].commits[0]["files"], tmp_path)
    assert fetch(hub, tmp_path) == BESIDE | {SINGLE, INDEX}
    for name in ("consolidated", "original", "of-00002", "pytorch_model", "onnx", "trainer"):
        assert not [path for _, path in hub.requests if "/resolve/" in path and name in path]
