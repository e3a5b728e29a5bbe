"""`compress bench` and its report, as far as they go without a GPU."""

import csv
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from transformers import AutoModelForCausalLM

from compressor.bench import report
from compressor.bench.decode import Decoder
from compressor.bench.kernels import random24
from compressor_kernels.packing import pack24
from tests.conftest import DEMO

WITHOUT_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
KERNELS = [
    {"out": 64, "in": 32, "rows": rows, "op": op, "us_median": 1.0, "ratio": ratio}
    for op, ratios in (("dense", (1, 1)), ("sparse24", (1.5, 0.9)), ("armor", (0.7, 0.8)))
    for rows, ratio in zip((1, 256), ratios, strict=True)
] + [{"out": 64, "in": 32, "rows": 1, "op": "torch semi-structured", "note": "not there"}]
DECODE = [
    {"model": model, "batch": batch, "tokens_per_s": speed, "peak_gb": memory}
    for model, memory, speeds in (("dense", 16.0, (100, 380)), ("compressed", 10.0, (140, 370)))
    for batch, speed in zip((1, 4), speeds, strict=True)
]


@WITHOUT_GPU
def test_without_a_gpu_nothing_is_measured(cli, tmp_path):
    done = cli("bench", "-o", tmp_path / "speed", code=1)
    assert done.stderr == "error: no CUDA device is here: nothing was measured\n"
    assert not done.stdout
    assert not (tmp_path / "speed").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--shape", "64"], "--shape is '64'; accepted: OUTxIN"),
        (["--shape", "64x30"], "IN a multiple of 4"),
        (["--rows", "1,x"], "--rows is '1,x'; accepted: positive numbers"),
        (["--batches", "0"], "--batches is '0'"),
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
