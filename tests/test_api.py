"""The Python API: the settings of a recipe as typed keywords, the same weights as the command
line.
"""

import inspect
from dataclasses import fields
from typing import get_args, get_type_hints

import pytest
from typer.main import get_command

import compressor
from compressor.cli import app
from compressor.cli.options import flag
from compressor.config.recipe import (
    SETTINGS,
    LowrankSettings,
    PlanSettings,
    PruneSettings,
    Recipe,
)
from compressor.errors import UsageError

COMMANDS = get_command(app).commands


@pytest.mark.parametrize("command", SETTINGS)
def test_a_keyword_and_an_option_for_every_setting_of_a_command(command):
    function = getattr(compressor, command)
    parameters = inspect.signature(function).parameters
    assert set(SETTINGS[command]) <= set(parameters)
    for name, parameter in parameters.items():
        assert parameter.kind is not parameter.VAR_KEYWORD
        assert parameter.annotation is not parameter.empty
        assert f"{name}: " in (function.__doc__ or "")
    options = {name for part in COMMANDS[command].params for name in part.opts}
    assert {flag(name) for name in SETTINGS[command]} <= options


def test_every_setting_is_one_of_a_command_and_of_the_type_that_its_keyword_takes():
    taken = {name for names in SETTINGS.values() for name in names}
    assert taken == {entry.name for entry in fields(Recipe)} - {"model"}
    for kinds in (PruneSettings, LowrankSettings, PlanSettings):
        for name, kind in get_type_hints(kinds).items():
            assert str in get_args(kind) or not isinstance(getattr(Recipe, name, None), str)
            for kept in (int, bool):
                same = type(getattr(Recipe, name, None)) is kept
                assert same == (kept in get_args(kind)), name


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
