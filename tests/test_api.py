"""The Python API: the settings of a recipe as typed keywords, the same weights as the command
line.
"""

import inspect
from dataclasses import fields

import pytest

import compressor
from compressor.config.recipe import Recipe
from compressor.errors import UsageError


def test_prune_has_a_keyword_for_every_setting():
    parameters = inspect.signature(compressor.prune).parameters
    assert {entry.name for entry in fields(Recipe)} <= set(parameters)
    for name, parameter in parameters.items():
        assert parameter.kind is not parameter.VAR_KEYWORD
        assert parameter.annotation is not parameter.empty
        assert f"{name}:" in (compressor.prune.__doc__ or "")


def test_prune_gives_the_bytes_of_the_command_line(cli, demo_model, rows, tmp_path):
    report = compressor.prune(
        demo_model, tmp_path / "a", method="sparsegpt", options={"damp": 0.1}, refine="lsq",
        refine_options={"iterations": 5},
        dataset=rows, num_samples=4, seq_len=32, ignore=["*k_proj"], device="cpu",
    )  # fmt: skip
    assert len(report.linears) == 24
    cli(
        "prune", demo_model, "-o", tmp_path / "b", "--method", "sparsegpt", "--set", "damp=0.1",
        "--refine", "lsq", "--set",
        "lsq.iterations=5", "--dataset", rows, "--num-samples", 4, "--seq-len", 32, "--ignore",
        "*k_proj", "-q",
    )  # fmt: skip
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_keywords_win_over_the_recipe(demo_model, rows, tmp_path):
    steps = []

    def progress(step, done, total, *_, **__):
        steps.append(step)

    report = compressor.prune(
        demo_model,
        tmp_path / "out",
        recipe="sparsegpt-24",
        method="magnitude",
        dataset=rows,
        progress=progress,
    )
    assert report.recipe["method"] == "magnitude"
    assert "blocks" in steps


def test_wrong_settings_are_refused(demo_model, tmp_path):
    with pytest.raises(UsageError, match="did you mean 'wanda'"):
        compressor.prune(demo_model, tmp_path / "out", method="wandaa")
    with pytest.raises(UsageError, match="tune is '3'; a value of type int is expected"):
        compressor.prune(demo_model, tmp_path / "out", tune="3")  # type: ignore[arg-type]  # the mistake under test
    with pytest.raises(TypeError, match="patern"):
        compressor.prune(demo_model, tmp_path / "out", patern="2:4")  # type: ignore[call-arg]  # the mistake under test
    assert not list(tmp_path.iterdir())


def test_load_takes_what_from_pretrained_takes(demo_model):
    import torch

    model = compressor.load(demo_model, dtype=torch.float32, attn_implementation="eager")
    assert model.dtype == torch.float32
    assert model.config._attn_implementation == "eager"
    assert not model.training
