"""The bundled recipes: listed, found by name, and every one runs on the demo model."""

import json

import pytest

from compressor.config.bundled_recipes import bundled, description, find
from compressor.config.read import load
from compressor.errors import UsageError
from compressor.methods import command

QUICK = {"armor": ["--set", "iterations=2", "--set", "finish=1"]}


@pytest.mark.parametrize("name", bundled())
def test_runs_on_the_demo_model(name, cli, demo_model, rows, tmp_path):
    settings = load(bundled()[name])
    quick = [*QUICK.get(settings["method"], []), *(["--tune", "1"] if settings.get("tune") else [])]
    small = ["--dataset", rows, "--num-samples", "4", "--seq-len", "32", "-q"]
    cli(
        command(settings["method"]),
        demo_model,
        "-o",
        tmp_path / "out",
        "--recipe",
        name,
        *quick,
        *small,
    )
    asked = json.loads((tmp_path / "out" / "report.json").read_text())["recipe"]
    changed = ("options", "tune", "plan")  # made quicker; the plan of a run is in its folder
    assert {key: asked[key] for key in settings if key not in changed} == {
        key: value for key, value in settings.items() if key not in changed
    }


@pytest.mark.parametrize("name", bundled())
def test_comment_has_the_command_and_its_numbers(name):
    text = bundled()[name].read_text()
    comment = [line for line in text.splitlines() if line.startswith("#")]
    assert description(bundled()[name])
    command_line = next(line for line in comment if f"--recipe {name}" in line)
    assert command_line.split()[1:3] == ["compress", command(load(bundled()[name])["method"])]
    assert "perplexity" in "\n".join(comment)
    assert "model" not in load(bundled()[name])


def test_listed_and_shown(cli):
    listed = json.loads(cli("recipes", "--json").stdout)
    assert [entry["name"] for entry in listed] == list(bundled())
    assert all(name in cli("recipes").stdout for name in bundled())
    assert cli("recipes", "armor-24").stdout.strip() == bundled()["armor-24"].read_text().strip()
    assert json.loads(cli("recipes", "armor-24", "--json").stdout)["settings"]["method"] == "armor"
    assert "did you mean 'armor-24'" in cli("recipes", "amor-24", code=2).stderr


def test_a_recipe_for_the_other_command_says_so_in_one_line(cli, demo_model, tmp_path):
    for asked, name, right in (
        ("prune", "lowrank-70", "lowrank"),
        ("prune", "mixed", "lowrank"),
        ("lowrank", "wanda-24", "prune"),
    ):
        done = cli(asked, demo_model, "-o", tmp_path / "out", "--recipe", name, "-q", code=2)
        assert f"use compress {right} --recipe {name}" in done.stderr
        assert done.stderr.count("\n") == 1


def test_a_mixed_recipe_mixes_forms_and_shows_its_plan(cli, demo_model, rows, tmp_path):
    shown = cli("recipes", "mixed").stdout
    assert '#     "*.[qk]_proj" = { keep = "40%" }' in shown
    small = ["--dataset", rows, "--num-samples", "4", "--seq-len", "32", "--tune", "0", "-q"]
    cli("lowrank", demo_model, "-o", tmp_path / "out", "--recipe", "mixed", *small)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    forms = {row["name"].split(".", 3)[3]: row["format"] for row in report["linears"]}
    assert {name: form for name, form in forms.items() if form == "pivot"} == {
        f"self_attn.{part}_proj": "pivot" for part in "qko"
    }
    assert set(forms.values()) == {"pivot", "sparse24"}
    assert "*" not in (tmp_path / "out" / "plan.toml").read_text()
    again = tmp_path / "again"
    cli("lowrank", demo_model, "-o", again, "--recipe", tmp_path / "out" / "recipe.toml", "-q")
    assert (again / "model.safetensors").read_bytes() == (
        tmp_path / "out" / "model.safetensors"
    ).read_bytes()


def test_a_printed_recipe_runs_as_the_bundled_one(cli, demo_model, rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small = ["--dataset", rows, "--num-samples", "4", "--seq-len", "32", "--tune", "0", "-q"]
    made = {}
    for name in bundled():
        (tmp_path / "mine.toml").write_text(cli("recipes", name).stdout)
        assert load(find("mine.toml")) == load(find(name))
    (tmp_path / "mine.toml").write_text(cli("recipes", "mixed").stdout)
    for out, recipe in (("a", "mixed"), ("b", "mine.toml")):
        cli("lowrank", demo_model, "-o", out, "--recipe", recipe, *small)
        made[out] = (tmp_path / out / "model.safetensors").read_bytes()
    assert made["a"] == made["b"]
    assert '#     "*" = { pattern = "2:4" }' in cli("recipes", "mine.toml").stdout
    # the plan as it was printed, changed, beside the recipe
    lines = (tmp_path / "mine.toml").read_text().splitlines()
    plan = [
        line.removeprefix("#").strip()
        for line in lines[next(i for i, line in enumerate(lines) if "comes with" in line) + 1 :]
    ]
    (tmp_path / "plans").mkdir()
    (tmp_path / "plans" / "mixed.toml").write_text(
        "\n".join(plan).replace('pattern = "2:4"', "dense = true")
    )
    cli("lowrank", demo_model, "-o", "c", "--recipe", "mine.toml", *small)
    formats = [
        row["format"] for row in json.loads((tmp_path / "c" / "report.json").read_text())["linears"]
    ]
    assert formats == ["pivot"] * 12


def test_what_cannot_be_shown_is_one_line(cli, tmp_path):
    for name, content, message in (
        ("a.toml", b"\xff\x00", "is not readable TOML"),
        ("b.toml", b'plan = "none.toml"', "names the plan"),
        ("c.toml", b'plan = "../x.toml"', "not inside its folder"),
        ("d.toml", b"plan = 3", "plan is 3; a value of type str is expected"),
        ("e.toml", b'plan = "' + b"x" * 5000 + b'"', "names the plan"),
        ("f.toml", b"method = 3", "method is 3; a value of type str is expected"),
        ("none.toml", None, "does not exist"),
        ("x" * 5000, None, "no file and no bundled recipe"),
    ):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        done = cli("recipes", tmp_path / name, code=2)
        assert message in done.stderr
        assert done.stderr.count("\n") == 1
        assert cli(
            "recipes", tmp_path / name, "--json", code=0 if name in ("b.toml", "e.toml") else 2
        )


def test_a_file_wins_over_a_bundled_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find("armor-24") == bundled()["armor-24"]
    (tmp_path / "armor-24").write_text('method = "wanda"')
    assert load(find("armor-24")) == {"method": "wanda"}
    with pytest.raises(UsageError, match="no file and no bundled recipe"):
        find("nothing")
