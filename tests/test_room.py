"""What a run has no room for is refused before work, in the same line by a dry run."""

import re
import shutil
from types import SimpleNamespace

import pytest

CHOOSING = ["--ratios", "ecoflap", "--pattern", "50%"]
DRY = [
    ["prune", "--method", "sparsegpt"],
    ["prune", *CHOOSING],
    ["lowrank", "--method", "svd_llm", "--keep", "50%"],
]


@pytest.fixture
def refused(cli, tiny, rows, tmp_path):
    """A function: command, exit code -> the one line that it ends with, sizes left out."""

    def run(command, *options, code, text=rows):
        given = [command[0], tiny("llama"), "-o", tmp_path / "out", *command[1:], *options]
        done = cli(*given, "--dataset", text, "--num-samples", 8, "--seq-len", 32, code=code)
        assert not done.stdout
        assert not list(tmp_path.iterdir())
        return re.sub(r"[\d.]+ [kMGT]?B\b", "_", " ".join(done.stderr.split()))

    return run


@pytest.mark.parametrize("command", DRY)
def test_memory_that_is_too_little(refused, monkeypatch, command):
    limit = ["--max-memory", "1MB"]
    line = refused(command, *limit, code=2)
    assert "--max-memory 1MB is too little: " in line
    assert refused(command, *limit, "--dry-run", code=2) == line
    assert refused(command, *limit, "--dry-run", "--json", code=2) == line
    monkeypatch.setattr("compressor.engine.memory.free_memory", lambda: 1)
    line = refused(command, code=2)
    assert "the free memory, _, is too little: " in line
    assert "say with --max-memory how much may be used" in line
    assert refused(command, "--dry-run", code=2) == line


def test_plan_says_of_memory_what_the_run_says(refused, monkeypatch):
    limit = ["--max-memory", "1MB"]
    assert refused(["plan", *CHOOSING], *limit, code=2) == refused(DRY[1], *limit, code=2)
    monkeypatch.setattr("compressor.engine.memory.free_memory", lambda: 1)
    assert refused(["plan", *CHOOSING], code=2) == refused(DRY[1], code=2)


def test_a_size_that_is_none(refused):
    for command in (DRY[0], [*DRY[0], "--dry-run"], ["plan", *CHOOSING], ["plan", "--pattern=2:4"]):
        assert "--max-memory is 'much'; accepted: " in refused(command, "--max-memory=much", code=2)


@pytest.mark.parametrize("command", DRY)
def test_a_disk_that_is_too_small(refused, monkeypatch, command):
    # room for the output, and for no more
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=220_000))
    line = refused(command, code=1)
    assert "out and what is kept on disk meanwhile may need _; " in line
    assert refused(command, "--dry-run", code=1) == line


def test_a_disk_that_is_too_small_to_choose_targets(
    refused, cli, tiny, rows, tmp_path, monkeypatch
):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    line = refused(["plan", *CHOOSING], code=1)
    assert "what choosing keeps on disk may need _; " in line
    assert "TMPDIR names another folder" in line
    owl = ["--ratios", "owl", "--pattern", "50%"]  # its hidden states have room in memory
    model = tiny("llama")
    few = ["--dataset", rows, "--num-samples", 8, "--seq-len", 32]
    cli("plan", model, "-o", tmp_path / "p", *owl, *few, "-q")
    assert (tmp_path / "p").exists()


def test_without_an_output_no_disk_is_looked_at(cli, tiny, rows, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    cli("prune", tiny("llama"), "--dataset", rows, "--dry-run")


@pytest.mark.parametrize("command", [["prune"], ["lowrank", "--keep", "60%"]])
def test_a_model_that_does_not_fit_to_write_text(
    refused, cli, tiny, rows, tmp_path, monkeypatch, command
):
    cli(command[0], tiny("llama"), "--dry-run", *command[1:])
    monkeypatch.setattr("compressor.calibration.tokens.free_memory", lambda: 1000)
    line = refused(command, code=1, text="self")
    assert "'self' needs the whole model in memory to sample from it" in line
    assert "give a text with --dataset" in line
    assert refused(command, "--dry-run", code=1, text="self") == line
    cli(command[0], tiny("llama"), "--dry-run", *command[1:], "--dataset", rows)
