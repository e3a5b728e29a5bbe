"""benchmarks/gpu.py from end to end, at tiny sizes and with times that are not taken: what a GPU
would run is run once.
"""

import json
import sys
from functools import partial

import pytest
import torch

from benchmarks import gpu
from compressor.bench import decode, kernels, timing, tune
from compressor_kernels import backend


@pytest.fixture
def pretended(monkeypatch, tmp_path):
    """The CPU in place of a GPU, and a table in a folder of the test."""
    cpu = torch.device("cpu")
    monkeypatch.setattr(timing, "need_gpu", lambda: cpu)
    monkeypatch.setattr(timing, "environment", lambda device: {"gpu": "no GPU"})
    monkeypatch.setattr(timing, "copies", lambda nbytes, device: 1)
    monkeypatch.setattr(kernels, "copies", lambda nbytes, device: 1)
    monkeypatch.setattr(timing, "copy_bandwidth", lambda device: 1.0)
    for module in (timing, kernels):
        monkeypatch.setattr(
            module,
            "measure",
            lambda calls, replays=1: [call() for call in calls] and timing.Time(2.0, 1.0, 3.0),
        )
    monkeypatch.setattr(backend, "works", lambda device: True)
    monkeypatch.setattr(backend, "multiprocessors", lambda device: 1)
    for name in ("synchronize", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *_: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 10**9)
    monkeypatch.setattr(decode.Decoder, "capture", lambda self: self.step)
    monkeypatch.setattr(
        decode, "measure_model", partial(decode.measure_model, batches=(1,), prompt=3, tokens=2)
    )
    monkeypatch.setattr(decode, "ROUND", 1)
    mma, dot = tune.mma_configs, tune.dot_configs
    monkeypatch.setattr(tune, "mma_configs", lambda *args: mma(*args)[:2])
    monkeypatch.setattr(tune, "dot_configs", lambda *args: dot(*args)[:2])
    monkeypatch.setattr(gpu, "CHECKED_SHAPES", ((128, 128),))
    monkeypatch.setattr(gpu, "CHECKED_ROWS", (1, 17))
    monkeypatch.setattr(gpu, "TUNED_ROWS", (1, 17))
    monkeypatch.setattr(gpu, "LLAMA_8B", {**gpu.LLAMA_8B, **dict(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=1,
        num_attention_heads=4, num_key_value_heads=2
    )})  # fmt: skip
    monkeypatch.setattr(kernels, "SHAPES", ((128, 128),))
    monkeypatch.setattr(kernels, "ROWS", (1, 97))
    monkeypatch.setattr(gpu, "TABLE", tmp_path / "table.json")
    gpu.TABLE.write_text("[]")
    return tmp_path


def test_everything(pretended, monkeypatch, capsys):
    monkeypatch.setattr(
        sys, "argv", ["gpu.py", "--write-table", "--output", str(pretended / "out")]
    )
    gpu.main()
    said = capsys.readouterr()
    checked = json.loads((pretended / "out" / "check.json").read_text())["check"]
    assert {row["kernel"].split()[0] for row in checked} >= {
        "mma",
        "gemv",
        "dot",
        "armor",
        "lowrank",
        "pivot",
        "unpack_stored",
    }
    assert all(row["ok"] for row in checked)
    table = json.loads(gpu.TABLE.read_text())
    assert {(row["op"], row["rows"]) for row in table} == {
        (op, m) for op in ("fragments", "armor", "skinny") for m in (1, 17)
    }
    assert all(row["us"] == 2.0 for row in table)
    result = json.loads((pretended / "out" / "bench.json").read_text())
    assert {row["op"] for row in result["kernels"]} == {
        "dense",
        "torch semi-structured",
        "sparse24",
        "armor",
        "lowrank",
        "pivot",
    }
    assert [row["model"] for row in result["decode"]] == ["dense", "2:4"]
    assert "sparse24 128 x 128: no gain here" in said.out
    assert (pretended / "out" / "ratio.svg").exists()
