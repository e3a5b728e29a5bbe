"""The library: docs/library.md as it stands, what Python may hand over, and errors in the words of
who asks: keywords for Python, options for the command line.
"""

import re
from pathlib import Path

import pytest

import compressor
from compressor.cli.options import as_flags
from compressor.errors import CompressError, UsageError
from tests.conftest import DEMO, ROOT

SMALL = {"num_samples": 4, "seq_len": 32, "device": "cpu"}


def test_the_examples_of_the_page_run(tmp_path, monkeypatch, capsys):
    (tmp_path / "demo").symlink_to(ROOT / "demo")
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
    code = "\n".join(re.findall(r"^```python\n(.*?)^```", text, re.M | re.S))
    exec(compile(code, "docs/library.md", "exec"), {})
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == "0.5625"
    assert printed[1] == "{'pattern': '2:4'}"
    assert float(printed[2]) > 50
    assert printed[3].endswith(" sparse24")
    assert printed[4].startswith("`ratios` shares out zeros")
    used = set(re.findall(r"^[^#\n]*\bcompressor\.(\w+)\(", text, re.M))
    assert used == set(compressor.__all__)


def test_every_function_is_typed_and_documented():
    for name in compressor.__all__:
        function = getattr(compressor, name)
        assert all(
            part in (function.__doc__ or "") for part in ("Args:", "Raises:", "compressor.errors.")
        ), name
        assert "return" in function.__annotations__, name


@pytest.mark.parametrize("value", ["*k_proj", ["*k_proj"], ("*k_proj",), {"*k_proj"}])
def test_one_name_is_as_good_as_a_list(value, rows, tmp_path):
    report = compressor.prune(DEMO, tmp_path / "out", dataset=rows, ignore=value, **SMALL)
    left = {row.name for row in report.left_dense if "k_proj" in row.name}
    assert len(left) == 4
    assert report.recipe["ignore"] == ["*k_proj"]


def test_one_name_to_refine_and_one_to_score(rows, tmp_path):
    report = compressor.prune(
        DEMO, tmp_path / "out", dataset=rows, refine="lsq", refine_only="*q_proj", **SMALL
    )
    assert report.recipe["refine_only"] == ["*q_proj"]
    scores = compressor.evaluate(tmp_path / "out", dataset=rows, device="cpu")
    assert list(scores) == [str(tmp_path / "out")]
    assert list(scores[str(tmp_path / "out")]["results"]) == ["rows"]


WRONG = {
    "model": lambda out: compressor.prune(3, out),
    "output": lambda out: compressor.prune(DEMO, None),
    "recipe": lambda out: compressor.prune(DEMO, out, recipe=3),
    "device": lambda out: compressor.prune(DEMO, out, device=0),
    "max_memory": lambda out: compressor.prune(DEMO, out, max_memory=8),
    "ignore": lambda out: compressor.prune(DEMO, out, ignore=[3]),
    "refine_only": lambda out: compressor.prune(DEMO, out, refine_only=3),
    "options": lambda out: compressor.prune(DEMO, out, options="damp"),
    "rank_options": lambda out: compressor.lowrank(DEMO, out, keep="50%", rank_options={3: 3}),
    "damp": lambda out: compressor.prune(DEMO, out, method="sparsegpt", options={"damp": 10**400}),
    "tune": lambda out: compressor.prune(DEMO, out, tune=True),
    "keep": lambda out: compressor.lowrank(DEMO, out, keep=0.7),
    "plan": lambda out: compressor.lowrank(DEMO, out, plan=3),
    "pattern": lambda out: compressor.plan(DEMO, pattern=0.5),
    "dataset": lambda out: compressor.evaluate(DEMO, dataset=3),
    "tasks": lambda out: compressor.evaluate(DEMO, tasks=[None]),
    "seq_len": lambda out: compressor.evaluate(DEMO, dataset="self", seq_len="9"),
    "limit": lambda out: compressor.evaluate(DEMO, dataset="self", limit=True),
    "dtype": lambda out: compressor.evaluate(DEMO, dataset="self", dtype="int8"),
    "models": lambda out: compressor.evaluate([], dataset="self"),
    "folder": lambda out: compressor.verify(3),
    "trust_remote_code": lambda out: compressor.pack(DEMO, out, trust_remote_code="yes"),
    "repo": lambda out: compressor.push(DEMO, None),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_value_of_the_wrong_type_is_one_line_that_names_it(name, tmp_path):
    with pytest.raises(CompressError) as caught:
        WRONG[name](tmp_path / "out")
    assert name in str(caught.value)
    assert "--" not in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


TOGETHER = [
    ("prune", {"ratios": "owl", "pattern": "2:4"}, "give a sparsity such as --pattern 50%"),
    ("prune", {"refine_only": "*x"}, "--refine-only '*x' is for --refine"),
    ("prune", {"seq_len": 1}, "--seq-len is 1"),
    ("prune", {"method": "svd"}, "use compress lowrank --keep 70%"),
    ("prune", {"ignore": "*nothing"}, "--ignore '*nothing' matches no linear"),
    ("lowrank", {"method": "wanda"}, "use compress prune;"),
    ("lowrank", {}, "give --keep, such as 70%"),
    ("plan", {"keep": "50%", "pattern": "2:4"}, "--keep 50% is for factors, --pattern 2:4 for"),
]


@pytest.mark.parametrize(("command", "settings", "told"), TOGETHER, ids=lambda part: str(part))
def test_errors_speak_the_words_of_who_asks(command, settings, told, cli, tmp_path):
    with pytest.raises(UsageError) as caught:
        getattr(compressor, command)(DEMO, tmp_path / "out", **settings)
    assert "--" not in str(caught.value)
    assert told in as_flags(str(caught.value))
    given = [
        part
        for name, value in settings.items()
        for part in (f"--{name.replace('_', '-')}", str(value))
    ]
    line = cli(command, DEMO, "-o", tmp_path / "out", "-q", *given, code=2).stderr
    assert told in line
    assert not re.search(r"`[a-z_]+[`=]", line)
    assert not list(tmp_path.iterdir())


def test_no_message_of_the_library_names_an_option():
    """What is said for the command line alone is in cli/, in pictures and the HTML page."""
    own = ("cli", "plots", "page", "bench", "doctor.py", "config/read.py")
    for path in sorted((ROOT / "compressor").rglob("*.py")):
        name = path.relative_to(ROOT / "compressor").as_posix()
        if name.startswith(own):
            continue
        for raised in re.findall(
            r"raise \w+\((.*?)\n *\) from|raise \w+\((.*?)\)\n", path.read_text(), re.S
        ):
            assert not re.search(r"(?<![\w`-])--[a-z]", "".join(raised)), (name, raised)


def test_inspect_is_what_the_command_prints(cli):
    import json

    assert compressor.inspect(DEMO) == json.loads(cli("inspect", DEMO, "--json").stdout)


def test_a_plan_is_the_file_that_is_written(tmp_path):
    plan = compressor.plan(DEMO, pattern="2:4", ignore="*k_proj", device="cpu")
    assert len(plan.linears) == 28
    assert plan.linears["model.layers.0.self_attn.k_proj"] == {"dense": True}
    plan.save(tmp_path / "plan.toml")
    assert (tmp_path / "plan.toml").read_text(encoding="utf-8") == plan.text
    with pytest.raises(CompressError, match="exists already"):
        compressor.plan(DEMO, Path(tmp_path / "plan.toml"), pattern="2:4")
