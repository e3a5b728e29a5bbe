"""Quality on really trained models: perplexities equal those of an independent implementation of
the formulas.
"""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM

from benchmarks.armor import block_statistics, output_loss, token_rows
from compressor.config.recipe import Recipe
from compressor.evaluation import METRIC, evaluate
from compressor.methods import armor, nowag
from compressor.pattern import Pattern
from compressor.run.pipeline import prune

# babyllama105, 128 calibration rows, float32: perplexity on self-sampled text and on TinyStories
DENSE = (1.994, 2.591)
CASES = {
    ("magnitude", "2:4"): (30.83, 33.59, 0.005),
    ("wanda", "2:4"): (23.71, 24.63, 0.005),
    ("sparsegpt", "2:4"): (3.391, 4.788, 0.02),
    ("magnitude", "50%"): (6.984, 8.424, 0.005),
    ("wanda", "50%"): (7.158, 9.333, 0.005),
    ("sparsegpt", "50%"): (2.610, 3.584, 0.02),
    ("wanda", "4:8"): (15.29, 16.92, 0.005),
}


def scores(model, canaries):
    tests = [
        str(canaries / "data" / "canary" / f"babyllama105-{name}-test.jsonl")
        for name in ("self", "tinystories")
    ]
    return [
        result[METRIC]
        for result in evaluate(str(model), datasets=tests, dtype="float32")["results"].values()
    ]


def test_dense(canaries):
    assert scores(canaries / "models" / "babyllama105", canaries) == pytest.approx(DENSE, rel=0.001)


@pytest.mark.parametrize(("method", "pattern"), CASES)
def test_quality_equals_the_reference(method, pattern, canaries, tmp_path):
    calibration = str(canaries / "data" / "canary" / "babyllama105-calib.jsonl")
    prune(
        Recipe(
            str(canaries / "models" / "babyllama105"),
            method=method,
            pattern=pattern,
            dataset=calibration,
        ),
        tmp_path / "out",
    )
    *expected, tolerance = CASES[method, pattern]
    assert scores(tmp_path / "out", canaries) == pytest.approx(expected, rel=tolerance)


def test_factors_that_see_gradients_halve_the_rise_of_the_loss(canaries, tmp_path):
    """At half the parameters, beside SVD-LLM, on TinyStories; benchmarks/lowrank.py has the whole
    table.
    """
    calibration = str(canaries / "data" / "canary" / "babyllama105-calib.jsonl")
    found = {}
    for method in ("svd_llm", "fisher"):
        recipe = Recipe(
            str(canaries / "models" / "babyllama105"),
            method=method,
            keep="50%",
            dataset=calibration,
        )
        prune(recipe, tmp_path / method)
        found[method] = math.log(scores(tmp_path / method, canaries)[1] / DENSE[1])
    assert found["fisher"] <= found["svd_llm"] / 2


@pytest.mark.parametrize("name", ["babyllama105", "stories260K", "books-1m"])
def test_armor_is_never_worse_than_nowag(name, canaries):
    """Every linear, in every dtype it may be stored in. `benchmarks/armor.py guarantee` does it
    with the defaults.
    """
    model = AutoModelForCausalLM.from_pretrained(
        canaries / "models" / name, dtype=torch.float32
    ).eval()
    rows = token_rows(str(canaries / "data" / "canary" / f"{name}-calib.jsonl"))[:8]
    pattern, worse = Pattern.parse("2:4"), []
    for block in model.model.layers:
        for (linear,), stats in block_statistics(model, block, rows, share=False):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                weight = linear.weight.detach().to(dtype)
                found = armor.compress(weight, stats, pattern, iterations=2, finish=1)
                plain = nowag.compress(weight, stats, pattern)
                if not output_loss(weight, found.dense(), stats) <= output_loss(
                    weight, plain.dense(), stats
                ):
                    worse.append((linear, dtype))
    assert not worse
