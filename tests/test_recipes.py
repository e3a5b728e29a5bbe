"""The bundled recipes: listed, found by name, and every one runs on the demo model."""

import json

import pytest

from compressor.bundled import bundled, description, find
from compressor.errors import UsageError
from compressor.recipe import load

QUICK = {"armor": ["--set", "iterations=2", "--set", "finish=1"]}


@pytest.mark.parametrize("name", bundled())
def test_runs_on_the_demo_model(name, cli, demo_model, rows, tmp_path):
    settings = load(bundled()[name])
    quick = [*QUICK.get(settings["method"], []), *(["--tune", "1"] if settings.get("tune") else [])]
    small = ["--dataset", rows, "--num-samples", "4", "--seq-len", "32", "-q"]
    cli("prune", demo_model, "-o", tmp_path / "out", "--recipe", name, *quick, *small)
    asked = json.loads((tmp_path / "out" / "report.json").read_text())["recipe"]
    assert {key: asked[key] for key in settings if key not in ("options", "tune")} == {
        key: value for key, value in settings.items() if key not in ("options", "tune")
    }


@pytest.mark.parametrize("name", bundled())
def test_comment_has_the_command_and_its_numbers(name):
    text = bundled()[name].read_text()
    comment = [line for line in text.splitlines() if line.startswith("#")]
    assert description(bundled()[name])
    assert f"--recipe {name}" in "\n".join(comment)
    assert "perplexity" in "\n".join(comment)
    assert "model" not in load(bundled()[name])


def test_listed_and_shown(cli):
    listed = json.loads(cli("recipes", "--json").stdout)
    assert [entry["name"] for entry in listed] == list(bundled())
    assert all(name in cli("recipes").stdout for name in bundled())
    assert cli("recipes", "armor-24").stdout.strip() == bundled()["armor-24"].read_text().strip()
    assert json.loads(cli("recipes", "armor-24", "--json").stdout)["settings"]["method"] == "armor"
    assert "did you mean 'armor-24'" in cli("recipes", "amor-24", code=2).stderr


def test_a_file_wins_over_a_bundled_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find("armor-24") == bundled()["armor-24"]
    (tmp_path / "armor-24").write_text('method = "wanda"')
    assert load(find("armor-24")) == {"method": "wanda"}
    with pytest.raises(UsageError, match="no file and no bundled recipe"):
        find("nothing")
