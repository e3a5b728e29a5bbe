"""`compress bench` on a CPU, and as far as it goes without a GPU; its report."""

import csv
import itertools
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from compressor.bench import cpu_decode, cpu_linears, model_shapes, report
from compressor.bench.decode import Decoder
from compressor.bench.kernels import random24
from compressor.errors import CompressError
from compressor_kernels.cpu import build
from compressor_kernels.linear import Sparse24Linear
from compressor_kernels.packing import pack24
from tests.conftest import DEMO
from tests.cpu_problems import here

WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
KERNELS = [
    {
        "out": 64,
        "in": 32,
        "rows": rows,
        "dtype": "bfloat16",
        "op": op,
        "us_median": 1.0,
        "ratio": ratio,
    }
    for op, ratios in (("dense", (1, 1)), ("sparse24", (1.5, 0.9)), ("armor", (0.7, 0.8)))
    for rows, ratio in zip((1, 256), ratios, strict=True)
] + [
    {
        "out": 64,
        "in": 32,
        "rows": 1,
        "dtype": "bfloat16",
        "op": "torch semi-structured",
        "note": "not there",
    }
]
DECODE = [
    {"model": model, "batch": batch, "tokens_per_s": speed, "peak_gb": memory}
    for model, memory, speeds in (("dense", 16.0, (100, 380)), ("compressed", 10.0, (140, 370)))
    for batch, speed in zip((1, 4), speeds, strict=True)
]


@WITHOUT_GPU
def test_without_kernels_for_the_cpu_nothing_is_measured(cli, tmp_path, monkeypatch):
    monkeypatch.setattr(build, "_found", build.Kernels("there is no compiler"))
    done = cli("bench", "-o", tmp_path / "speed", code=1)
    said = "error: no CUDA device is here, and there is no compiler: nothing was measured\n"
    assert done.stderr == said
    assert not done.stdout
    assert not (tmp_path / "speed").exists()


@WITHOUT_GPU
def test_linears_on_a_cpu(cli, tmp_path):
    here()
    arguments = ["--shape", "128x256", "--rows", "1,3", "--seconds", 1, "--json", "--quiet"]
    found = json.loads(cli("bench", *arguments, "-o", tmp_path / "speed").stdout)
    assert found == json.loads((tmp_path / "speed" / "bench.json").read_text())
    assert {"cpu", "threads", "compiler", "torch"} <= set(found["environment"])
    measured = {(row["dtype"], row["rows"], row["op"]) for row in found["kernels"]}
    ops = ("dense", "dense, our kernel", "sparse24", "armor", "lowrank", "pivot")
    assert measured == set(itertools.product(("bfloat16", "float32"), (1, 3), ops))
    for row in found["kernels"]:
        assert row["us_min"] > 0
        assert row["ratio"] == pytest.approx(_dense(found, row) / row["us_min"], rel=0.02)
    picture = ElementTree.parse(tmp_path / "speed" / "ratio.svg").getroot()
    assert found["environment"]["cpu"] in "".join(picture.itertext())


def _dense(found, row):
    same = ("out", "in", "rows", "dtype")
    return next(
        other["us_min"]
        for other in found["kernels"]
        if other["op"] == "dense" and all(other[key] == row[key] for key in same)
    )


def test_bytes_are_those_of_the_stored_form(monkeypatch):
    """A packed linear reads 9/16 of the bytes in bfloat16, 17/32 in float32."""
    here()
    monkeypatch.setattr(cpu_linears, "fastest", lambda calls, *_: dict.fromkeys(calls, 1e-6))
    for dtype, share in ((torch.bfloat16, 9 / 16), (torch.float32, 17 / 32)):
        found = cpu_linears.measure_shape((1024, 1024), [1], dtype, 1.0, 1.0)
        speed = {row["op"]: row["gb_per_s"] for row in found}
        assert speed["sparse24"] / speed["dense"] == pytest.approx(share, rel=0.01)


@WITHOUT_GPU
def test_decoding_on_a_cpu(cli, out):
    here()
    arguments = [out, "--shape", "64x64", "--rows", 1, "--seconds", 1, "--tokens", 8]
    found = json.loads(cli("bench", *arguments, "--json", "--quiet").stdout)
    assert [row["model"] for row in found["decode"]] == ["dense", "compressed"]
    for row in found["decode"]:
        assert row["tokens_per_s"] == pytest.approx(1000 / row["ms_per_step"], rel=0.02)
        assert row["prefill_s"] > 0
        assert row["peak_gb"] > 0.05
    assert "64 x 64" in cli("bench", *arguments, "--quiet").stdout


def test_the_peak_memory_is_that_of_the_process_alone():
    large = bytearray(b"1") * (1 << 30)
    program = "from compressor.bench import cpu_decode; print(cpu_decode.peak_memory())"
    told = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    ).stdout
    assert cpu_decode.peak_memory() >= len(large)
    assert 1 << 20 < int(told) < len(large)


def test_a_model_that_does_not_load_is_said(monkeypatch, tmp_path):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    with pytest.raises(CompressError, match=r"decoding ended before it was measured: .*nowhere"):
        cpu_decode.measure_model(str(tmp_path / "nowhere"), 4)


@torch.no_grad()
@pytest.mark.parametrize("runtime", ["dense", "packed"])
def test_a_model_of_a_known_shape(monkeypatch, runtime):
    tiny = {
        "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50,
        "tie_word_embeddings": True,
    }  # fmt: skip
    monkeypatch.setitem(model_shapes.MODELS, "tiny", tiny)
    model = model_shapes.random_model("tiny", runtime, torch.device("cpu"))
    logits = model(torch.arange(9)[None]).logits
    assert logits.isfinite().all()
    assert logits.std() > 0.01
    assert model.lm_head.weight is model.model.embed_tokens.weight
    linears = [part for name, part in model.named_modules() if name.endswith("_proj")]
    kind = {"dense": nn.Linear, "packed": Sparse24Linear}[runtime]
    assert len(linears) == 14
    assert all(isinstance(part, kind) for part in linears)
    shapes = {(part.out_features, part.in_features) for part in linears}
    assert shapes == set(model_shapes.linears_of("tiny"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--shape", "64"], "--shape is '64'; accepted: OUTxIN"),
        (["--shape", "64x30"], "IN a multiple of 4"),
        (["--rows", "1,x"], "--rows is '1,x'; accepted: positive numbers"),
        (["--batches", "0"], "--batches is '0'"),
        (["--shape", "llama-9b"], "or tinyllama, llama-1b, llama-8b"),
        (["--shape", "llama-1b", "--shape", "tinyllama"], "one is decoded at a time"),
    ],
)
def test_wrong_options(cli, arguments, said):
    assert said in cli("bench", *arguments, code=2).stderr


def test_report_writes_tables_and_a_plot(tmp_path):
    report.write(
        tmp_path / "out", {"environment": {"gpu": "a GPU"}, "kernels": KERNELS, "decode": DECODE}
    )
    rows = list(csv.DictReader((tmp_path / "out" / "kernels.csv").open()))
    assert [row["ratio"] for row in rows] == ["1", "1", "1.5", "0.9", "0.7", "0.8", ""]
    picture = ElementTree.parse(tmp_path / "out" / "ratio.svg").getroot()
    assert len(picture.findall("{*}polyline")) == 2
    assert "a GPU" in "".join(picture.itertext())


def test_it_says_so_where_nothing_is_gained():
    assert report.verdicts({"kernels": KERNELS, "decode": DECODE}) == [
        "sparse24 64 x 32: up to 1.50x dense (at 1 rows); no gain here at 256 rows",
        "armor 64 x 32: no gain here",
        "decoding compressed at batch 1: 1.40x dense, 0.62x its peak memory",
        "decoding compressed at batch 4: no gain here (0.97x dense), 0.62x its peak memory",
    ]


def test_random_weights_are_full():
    values, _ = pack24(random24(16, 64, torch.bfloat16, torch.device("cpu")))
    assert values.count_nonzero() == 16 * 32


@torch.no_grad()
def test_the_step_on_a_cpu_decodes_what_generate_does():
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    decoder = cpu_decode.Decoder(model, room=8, prompt=5)
    expected = model.generate(
        decoder.ids,
        attention_mask=torch.ones_like(decoder.ids),
        max_new_tokens=5,
        min_new_tokens=5,
        do_sample=False,
    )
    tokens = [decoder.token]
    for _ in range(4):
        assert decoder.step() > 0
        tokens.append(decoder.token)
    assert torch.equal(torch.cat(tokens, 1), expected[:, 5:])


@torch.no_grad()
def test_the_step_decodes_what_generate_does():
    model = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()
    decoder = Decoder(model, batch=2, prompt=5, tokens=8)
    ids = torch.randint(
        3, model.config.vocab_size, (2, 5), generator=torch.Generator().manual_seed(0)
    )
    expected = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=5,
        min_new_tokens=5,
        do_sample=False,
    )
    tokens = [decoder.token.clone()]
    for _ in range(4):
        decoder.step()
        tokens.append(decoder.token.clone())
    assert torch.equal(torch.cat(tokens, 1), expected[:, 5:])
