"""Perplexity and KL divergence against a literal transcription, and a pass that is interrupted."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from compressor.evaluation import perplexity, windows
from compressor.evaluation.windows import Sums, score_windows

ROWS = [
    torch.randint(3, 4096, (length,), generator=torch.Generator().manual_seed(length))
    for length in (40, 40, 17, 40)
]


@pytest.fixture(scope="module")
def model(demo_model):
    return AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def other(demo_model):
    model = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32).eval()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(0.5)
    return model


def log_probabilities(model, row):
    with torch.no_grad():
        return model(row[None]).logits[0].double().log_softmax(-1)


def test_perplexity_is_the_definition(model):
    losses = []
    for row in ROWS:
        found = log_probabilities(model, row)
        losses += [-found[place, token].item() for place, token in enumerate(row[1:].tolist())]
    assert perplexity(model, ROWS) == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)


def test_divergence_is_the_definition(model, other, monkeypatch):
    monkeypatch.setattr(windows, "_CHUNK", 7)
    total, tokens = 0.0, 0
    for row in ROWS:
        p, q = log_probabilities(model, row), log_probabilities(other, row)
        for place in range(len(row) - 1):
            total += sum(
                math.exp(a) * (a - b)
                for a, b in zip(p[place].tolist(), q[place].tolist(), strict=True)
            )
            tokens += 1
    sums = score_windows(other, ROWS, baseline=model)
    assert sums.tokens == tokens
    assert sums.divergence / tokens == pytest.approx(total / tokens, rel=1e-4)
    assert sums.divergence / tokens > 1e-3
    assert sums.perplexity == pytest.approx(perplexity(other, ROWS), rel=1e-9)


def test_a_model_does_not_diverge_from_itself(model):
    assert score_windows(model, ROWS, baseline=model).divergence == 0.0


@pytest.mark.parametrize("after", [1, 2])
def test_an_interrupted_pass_goes_on_to_the_same_bits(model, other, monkeypatch, after):
    monkeypatch.setattr(windows, "_BATCH_TOKENS", 40)
    whole = score_windows(other, ROWS, baseline=model)
    saved, calls = [], []

    def interrupt(done, total):
        calls.append(done)
        if len(calls) == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score_windows(other, ROWS, baseline=model, save=saved.append, progress=interrupt)
    start = Sums.read(saved[-1])
    assert start.done == after
    passes = []
    assert (
        score_windows(
            other,
            ROWS,
            baseline=model,
            start=start,
            progress=lambda done, total: passes.append(done),
        )
        == whole
    )
    assert passes == list(range(after + 1, 5))


def test_far_progress_is_saved_now_and_then(model, monkeypatch):
    monkeypatch.setattr(windows, "_BATCH_TOKENS", 40)
    monkeypatch.setattr(windows, "_SAVE_SECONDS", -1.0)
    saved = []
    score_windows(model, ROWS, save=saved.append)
    assert [sums["done"] for sums in saved] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    "value", [None, {}, {"done": "3", "tokens": 1, "loss": 1.0, "divergence": 0.0}, {"done": 3}]
)
def test_sums_that_are_none(value):
    assert Sums.read(value) is None
