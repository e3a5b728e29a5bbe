"""What is only told fails no run; what is not written is named; a leading ~ is a home folder."""

import os
import shutil
import subprocess
import sys

import pytest

from compressor.checkpoint import atomic
from compressor.cli import _at_home
from compressor.cli.streams import Unfailing
from compressor.errors import OutputError, UsageError
from compressor.text import home_path
from tests.conftest import DEMO

PRUNE = ["prune", DEMO, "--method", "magnitude", "-o"]


def run(*words, before="", after="", **changes):
    """The command in a shell, with what redirects it behind."""
    quoted = " ".join(f"'{word}'" for word in (sys.executable, "-m", "compressor", *words))
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {before} {quoted} {after}"],
        env={**os.environ, **changes},
        capture_output=True,
    )


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp437"])
def test_streams_that_are_not_utf_8(tmp_path, encoding):
    out = tmp_path / "café → out"
    done = run(*PRUNE, out, PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr
    assert (out / "config.json").is_file()
    assert b"\\u2192" in done.stdout
    data = tmp_path / "rows.jsonl"
    data.write_text('{"input_ids": [5, 6, 7, 8]}\n')
    asked = ["--dataset", data, "--tasks", "", "--no-cache", "--baseline", out]
    done = run("eval", out, *asked, PYTHONIOENCODING=encoding)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    "after", ["2>/dev/full", "2>&-", ">&-", ">/dev/full", "| true", "2>&1 | true"]
)
def test_streams_that_take_nothing(tmp_path, after):
    done = run(*PRUNE, tmp_path / "out", after=after)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "config.json").is_file()
    assert (tmp_path / "out.report.json").is_file()
    assert b"Traceback" not in done.stderr


def test_a_result_that_standard_output_does_not_take_is_an_error():
    done = run("inspect", DEMO, "--json", after=">/dev/full")
    assert done.returncode == 1
    assert done.stderr == b"error: No space left on device: standard output\n"


def test_an_unfailing_stream_is_its_stream(tmp_path):
    with (tmp_path / "a").open("w", encoding="utf-8") as file:
        stream = Unfailing(file)
        assert stream.write("text") == 4
        assert stream.encoding == "utf-8"
        stream.flush()
        assert (tmp_path / "a").read_text() == "text"
    assert stream.write("after it was closed") == 19
    stream.flush()


# --- files that a user named


def test_a_full_disk_names_the_file(cli, demo_model, tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").write_text('{"input_ids": [5, 6, 7, 8]}\n')
    scores, plan = tmp_path / "scores.json", tmp_path / "plan.toml"

    def full(handle):
        raise OSError(28, "No space left on device")

    asked = [tmp_path / "model", "--dataset", tmp_path / "rows.jsonl", "-q", "-o", scores]
    shutil.copytree(demo_model, tmp_path / "model")  # scores are kept beside it
    with monkeypatch.context() as broken:
        broken.setattr(atomic.os, "fsync", full)
        for command, path in (
            (["eval", *asked], scores),
            (["plan", demo_model, "-o", plan, "--pattern", "2:4", "-q"], plan),
        ):
            said = cli(*command, code=1).stderr
            assert f"output {path} could not be written: No space left on device" in said
    assert not [
        path for path in tmp_path.iterdir() if path.name.startswith((scores.name, plan.name))
    ]
    with pytest.raises(OutputError, match="a/b could not be written: No such file"):
        atomic.write_output(tmp_path / "a" / "b", b"")


# --- home folders


@pytest.mark.parametrize("before", ["", "--output=", "-o", "--text-column="])
def test_a_leading_tilde_is_a_home_folder(monkeypatch, tmp_path, before):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert _at_home(f"{before}~/out") == f"{before}{tmp_path}/out"
    assert _at_home(f"{before}~") == f"{before}{tmp_path}"
    for word in ("out", "./~/out", "a~b", "lsq.x=~1", "*~*", "", "-q", "--", "two\nlines"):
        assert _at_home(word) == word
    for name in ("~nobody-of-that-name", "~nobody-of-that-name/out"):
        with pytest.raises(UsageError, match=r"there is no such user; \./~nobody"):
            home_path(name)


@pytest.mark.parametrize("form", ["-o {}", "--output={}"])
def test_outputs_at_home(cli, monkeypatch, tmp_path, form):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "home").mkdir()
    printed = cli(*PRUNE[:-1], *form.format("~/out").split(), "-q").stdout
    assert printed == f"{tmp_path}/home/out\n"
    assert "is sound" in cli("verify", "~/out").stdout
    cli("inspect", "~/out")
    cli("unpack", "~/out", "-o", "~/dense")
    cli("plan", str(DEMO), "-o", "~/plan.toml", "--pattern", "2:4", "-q")
    assert sorted(path.name for path in (tmp_path / "home").iterdir()) == [
        "dense", "out", "out.report.json", "plan.toml",
    ]  # fmt: skip
    assert not (tmp_path / "~").exists()
    said = cli(*PRUNE, "~nobody-of-that-name/out", "-q", code=2).stderr
    assert "there is no such user" in said
    assert not list(tmp_path.glob("~*"))


def test_outputs_at_home_from_python(monkeypatch, tmp_path):
    import compressor

    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    compressor.prune(DEMO, "~/out", method="magnitude")
    assert (tmp_path / "home" / "out" / "config.json").is_file()
    assert not (tmp_path / "~").exists()
