"""What runs leave behind that were killed: used where it is good, removed where nobody needs it."""

import os
import shutil

import pytest

from compressor.checkpoint.work_state import claim, remove_dead, work_path
from compressor.config.recipe import Recipe
from compressor.errors import OutputError
from compressor.run import pipeline
from compressor.tools.pack import pack
from tests.test_resume import contents, in_child, kill_me, stop_after


@pytest.fixture
def recipe(tiny, rows, monkeypatch):
    monkeypatch.setattr("compressor.calibration.capture._BATCH_TOKENS", 64)
    settings = {"method": "fisher", "keep": "0.5", "num_samples": 8, "seq_len": 32}
    return Recipe(model=str(tiny("llama")), dataset=str(rows), **settings)


def killed(recipe, output, step, done):
    """Run until so many of a step are done, and be killed there."""

    def progress(name, count, *_, **__):
        if (name, count) == (step, done):
            kill_me()

    assert in_child(lambda: pipeline.prune(recipe, output, progress=progress)) < 0


def test_factors_that_are_there_are_not_made_again(recipe, tmp_path, monkeypatch):
    pipeline.prune(recipe, tmp_path / "whole")
    output, work = tmp_path / "out", work_path(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        pipeline.prune(recipe, output, progress=stop_after(1))
    names = sorted(path.name for path in (work / "factors").iterdir())
    assert names == ["factors-00001.safetensors", "factors-00002.safetensors"]  # 0 is finished
    monkeypatch.delattr("compressor.allocation.rank.choose.factor_all")
    pipeline.prune(recipe, output)
    assert contents(output) == contents(tmp_path / "whole")
    assert not work.exists()


@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: _flip(path)])
def test_factors_that_are_not_what_was_written_are_refused(recipe, tmp_path, damage):
    output, work = tmp_path / "out", work_path(tmp_path / "out")
    with pytest.raises(KeyboardInterrupt):
        pipeline.prune(recipe, output, progress=stop_after(1))
    damage(work / "factors" / "factors-00002.safetensors")
    with pytest.raises(OutputError, match=r"is damaged: .*remove .*\.out\.partial to start anew"):
        pipeline.prune(recipe, output)


def _flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(("step", "done"), [("gradients", 1), ("trial", 2)])
def test_what_a_killed_pass_kept_on_disk_goes(recipe, tmp_path, step, done):
    pipeline.prune(recipe, tmp_path / "whole")
    output, work = tmp_path / "out", work_path(tmp_path / "out")
    killed(recipe, output, step, done)
    scratch = {path.name for path in work.glob("scratch-*")}
    assert scratch or step == "trial"
    with pytest.raises(KeyboardInterrupt):
        pipeline.prune(recipe, output, progress=stop_after(1))
    assert not list(work.glob("scratch-*"))
    pipeline.prune(recipe, output)
    assert contents(output) == contents(tmp_path / "whole")
    assert not work.exists()


@pytest.fixture
def zeros(tiny, tmp_path):
    """A dense checkpoint that is 2:4."""
    settings = {"method": "magnitude", "format": "dense"}
    pipeline.prune(Recipe(model=str(tiny("llama")), **settings), tmp_path / "zeros")
    return tmp_path / "zeros"


def dead(output):
    """The work folder of a run of pack that was killed."""
    folder = output.with_name(f".{output.name}.4194304.partial")
    assert in_child(lambda: (claim(folder), (folder / "spool").mkdir(), kill_me())) < 0
    return folder


def test_the_next_run_removes_the_folder_of_a_dead_one(zeros, recipe, tmp_path, cli):
    output = tmp_path / "out"
    other = dead(tmp_path / "out.2")
    left = dead(output)
    pack(zeros, output)
    assert not left.exists()
    shutil.rmtree(output)
    left = dead(output)
    with pytest.raises(KeyboardInterrupt):
        pipeline.prune(recipe, output, progress=stop_after(1))
    assert not left.exists()
    left = dead(output)
    cli("resume", output)
    assert not left.exists()
    assert other.exists()  # of another output


def test_the_folder_of_a_run_that_is_under_way_stays(tmp_path):
    output = tmp_path / "out"
    folder = output.with_name(".out.17.partial")
    handle = claim(folder)
    remove_dead(output)
    assert folder.exists()
    os.close(handle)
    remove_dead(output)
    assert not folder.exists()


def test_a_folder_that_was_removed_before_it_was_locked_is_made_again(tmp_path, monkeypatch):
    import fcntl

    folder, real, calls = tmp_path / ".out.17.partial", fcntl.flock, []

    def flock(handle, how):
        if not calls:
            folder.rmdir()  # the other run, which found it without a lock
        calls.append(how)
        real(handle, how)

    monkeypatch.setattr("compressor.checkpoint.work_state.fcntl.flock", flock)
    handle = claim(folder)
    assert len(calls) == 2
    assert folder.stat().st_ino == os.fstat(handle).st_ino
    os.close(handle)
