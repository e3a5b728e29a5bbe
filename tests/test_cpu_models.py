"""Whole models that are computed packed on a CPU: as good as their dense twins, also by two threads
at once.
"""

import time

import pytest
import torch
from transformers import AutoTokenizer

import compressor.runtime
from compressor.evaluation.windows import perplexity
from compressor_kernels.one_row import OneRowLinear
from tests.at_once import at_once
from tests.conftest import ROOT
from tests.cpu_problems import here


@pytest.fixture(autouse=True)
def _kernels():
    here()


@pytest.fixture(scope="module")
def rows(demo_model):
    """Windows of 64 tokens of a text that stays as it is."""
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    ids = torch.tensor(tokenizer((ROOT / "LICENSE").read_text())["input_ids"])
    return list(ids[: len(ids) // 64 * 64].view(-1, 64))


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-3), (torch.float16, 1e-3)]
)
def test_the_perplexity_is_that_of_the_dense_twin(made, rows, dtype, bound):
    found = {
        runtime: perplexity(compressor.runtime.load(made, dtype=dtype, runtime=runtime), rows)
        for runtime in ("packed", "dense")
    }
    assert found["packed"] == pytest.approx(found["dense"], rel=bound)


def test_two_threads_on_one_model(made, rows):
    model = compressor.runtime.load(made, runtime="packed")
    inputs = [rows[0][None, :1], rows[1][None, :5], torch.stack(rows[2:5])]
    found = []

    @torch.no_grad()
    def work():
        end = time.monotonic() + 10
        while time.monotonic() < end:
            found.extend(
                not torch.equal(model(ids).logits, logits)
                for ids, logits in zip(inputs, expected, strict=True)
            )

    with torch.no_grad():
        expected = [model(ids).logits for ids in inputs]
    at_once([work] * 2)
    assert found
    assert not any(found)


def test_the_head_computes_with_the_kernel_too(made, rows):
    model = compressor.runtime.load(made, dtype=torch.bfloat16, runtime="packed")
    dense = compressor.runtime.load(made, dtype=torch.bfloat16, runtime="dense")
    assert type(model.lm_head) is OneRowLinear
    assert type(dense.lm_head) is torch.nn.Linear
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.state_dict().keys() >= {"lm_head.weight", "model.embed_tokens.weight"}
    sampled = {"max_new_tokens": 12, "do_sample": False}
    eager = model.generate(rows[0][None, :9], **sampled)
    static = model.generate(rows[0][None, :9], cache_implementation="static", **sampled)
    assert torch.equal(eager, static)
