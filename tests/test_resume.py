"""A run that is cut off goes on from the block it was in, and ends with the same bytes."""

import errno
import json
import os
import shutil
import signal
from dataclasses import replace

import pytest
import torch

from compressor.calibration.hidden_states import Batch, Batches
from compressor.checkpoint.work_state import is_complete, report_path, work_path
from compressor.config.recipe import Recipe
from compressor.errors import OutputError
from compressor.run import pipeline
from compressor.run.journal import Journal, is_running

CASES = {
    "magnitude": {"method": "magnitude"},
    "wanda": {"method": "wanda"},
    "tuned": {"method": "sparsegpt", "tune": 1},
    "dense": {"method": "wanda", "pattern": "50%"},
}


@pytest.fixture
def job(tiny, rows):
    def make(case="wanda", **more):
        settings = {"num_samples": 8, "seq_len": 32, **CASES[case], **more}
        return Recipe(model=str(tiny("llama")), dataset=str(rows), **settings)

    return make


@pytest.fixture
def small_batches(monkeypatch):
    monkeypatch.setattr("compressor.calibration.capture._BATCH_TOKENS", 64)  # several batches


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def cut_off(monkeypatch, after, how):
    """Have the run end by `how()` just before its `after`-th step that is to survive; gives the
    counter of the steps.
    """
    steps = [0]

    def counting(name):
        real = getattr(os, name)

        def counted(*arguments, **options):
            steps[0] += 1
            if steps[0] == after:
                how()
            return real(*arguments, **options)

        monkeypatch.setattr(os, name, counted)

    for name in ("fsync", "replace", "unlink"):
        counting(name)
    return steps


def in_child(function):
    """Run in a forked process; gives its exit code, or the negative number of the signal that ended
    it.
    """
    if not (child := os.fork()):
        code = 9
        try:
            function()
            code = 0
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_me():
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "disk"])
@pytest.mark.parametrize("case", ["wanda", "tuned"])
def test_killed_at_any_step_the_same_command_gives_the_same_bytes(
    monkeypatch, job, small_batches, tmp_path, case, on_disk
):
    if on_disk:
        monkeypatch.setattr(
            pipeline, "choose_home", lambda job, tokens, device, limit, folder, beside: folder
        )
    whole, recipe = tmp_path / "whole", job(case)
    with monkeypatch.context() as patch:
        steps = cut_off(patch, 0, kill_me)
        pipeline.prune(recipe, whole)
    expected, total, output = contents(whole), steps[0], tmp_path / "out"
    assert total > 20
    for after in [*range(1, total + 1, 5), total - 2, total - 1, total]:

        def run(after=after):
            cut_off(monkeypatch, after, kill_me)
            pipeline.prune(recipe, output)

        assert in_child(run) == -signal.SIGKILL
        assert not output.exists() or contents(output) == expected
        if not output.exists() or is_complete(output):
            pipeline.prune(recipe, output)
        assert contents(output) == expected
        assert report_path(output).exists()
        shutil.rmtree(output)
        shutil.rmtree(work_path(output), ignore_errors=True)
        report_path(output).unlink()


@pytest.mark.parametrize("case", ["magnitude", "wanda", "dense"])
def test_a_full_disk_can_be_resumed_after_making_room(monkeypatch, job, tmp_path, case):
    pipeline.prune(job(case), tmp_path / "whole")

    def full():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for after in (3, 8, 14, 20, 26):
        output = tmp_path / f"out{after}"
        with monkeypatch.context() as patch:
            cut_off(patch, after, full)
            with pytest.raises(OutputError, match="No space left on device"):
                pipeline.prune(job(case), output)
        assert not output.exists()
        pipeline.prune(job(case), output)
        assert contents(output) == contents(tmp_path / "whole")
        assert not work_path(output).exists()


def stop_after(blocks):
    """A Progress that interrupts the run after so many blocks."""

    def progress(step, done, total, *_, **__):
        if step == "blocks" and done == blocks:
            raise KeyboardInterrupt

    return progress


@pytest.fixture
def unfinished(job, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        pipeline.prune(job(), tmp_path / "out", progress=stop_after(2))
    return tmp_path / "out"


def test_it_goes_on_at_the_block_it_was_in(job, unfinished, tmp_path):
    seen = []
    report = pipeline.prune(
        job(), unfinished, progress=lambda step, done, total, *_, **__: seen.append((step, done))
    )
    assert [done for step, done in seen if step == "blocks"] == [
        2,
        3,
    ]  # where it goes on, and what it did
    assert report.run["resumed_at_block"] == 2
    assert len(report.run["block_seconds"]) == len(report.blocks) == 3
    pipeline.prune(job(), tmp_path / "whole")
    assert contents(unfinished) == contents(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "out",
        "out.report.json",
        "whole",
        "whole.report.json",
    ]


def test_resume_needs_only_the_output(cli, job, unfinished, tmp_path):
    printed = cli("resume", unfinished)
    assert printed.stdout.rstrip().endswith(str(unfinished))
    pipeline.prune(job(), tmp_path / "whole")
    assert contents(unfinished) == contents(tmp_path / "whole")
    assert "out is there, and complete" in cli("resume", unfinished, code=1).stderr


def test_resume_finds_the_model_from_another_folder(cli, job, tiny, rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").symlink_to(tiny("llama"))
    recipe = Recipe(model="model", dataset=str(rows), num_samples=8, seq_len=32)
    with pytest.raises(KeyboardInterrupt):
        pipeline.prune(recipe, tmp_path / "out", progress=stop_after(1))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    cli("resume", "../out", "-q")
    assert 'model = "model"' in (tmp_path / "out" / "recipe.toml").read_text()


def test_there_is_nothing_to_resume(cli, tmp_path):
    assert "no unfinished run" in cli("resume", tmp_path / "out", code=1).stderr


def test_an_interruption_says_how_to_go_on(cli, tiny, rows, tmp_path, monkeypatch):
    real = pipeline.compress_blocks

    def interrupted(*arguments, **options):
        yield next(real(*arguments, **options))
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "compress_blocks", interrupted)
    common = ["--dataset", rows, "--num-samples", 8, "--seq-len", 32, "-q"]
    said = cli("prune", tiny("llama"), "-o", tmp_path / "out", *common, code=130).stderr
    assert "interrupted: 1 blocks of" in said
    assert f"`compress resume {tmp_path / 'out'}`" in said
    monkeypatch.setattr(
        pipeline, "compress_blocks", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
    )
    said = cli(
        "prune", tiny("llama"), "-o", tmp_path / "new", "--method", "magnitude", "-q", code=130
    ).stderr
    assert said == "interrupted: nothing was written\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.partial"]


def test_another_run_is_refused_while_one_is_under_way(job, tmp_path):
    def second(*_, **__):
        with pytest.raises(
            OutputError, match=rf"another run \(process {os.getpid()}\) is making the same output"
        ):
            pipeline.prune(job(), tmp_path / "out")

    pipeline.prune(job(), tmp_path / "out", progress=second)
    assert (tmp_path / "out").is_dir()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"method": "sparsegpt"}, "option method was 'wanda' and is 'sparsegpt' now"),
        ({"seed": 7}, "option seed was 0 and is 7 now"),
        ({"num_samples": 4}, "option num-samples was 8 and is 4 now"),
        ({"ignore": ["*q_proj"]}, "option ignore was"),
    ],
)
def test_other_options_are_refused(job, unfinished, change, match):
    before = contents_below(work_path(unfinished))
    with pytest.raises(OutputError, match=match):
        pipeline.prune(job(**change), unfinished)
    assert contents_below(work_path(unfinished)) == before


def contents_below(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_another_model_text_or_version_is_refused(job, unfinished, rows, tmp_path, monkeypatch):
    model = tmp_path / "model"
    shutil.copytree(job().model, model)
    shutil.copy(rows, tmp_path / "rows.jsonl")
    recipe = Recipe(
        model=str(model), dataset=str(tmp_path / "rows.jsonl"), num_samples=8, seq_len=32
    )
    times = (tmp_path / "rows.jsonl").stat()
    output = tmp_path / "other"

    def refused(match):
        with pytest.raises(OutputError, match=match):
            pipeline.prune(recipe, output)

    with pytest.raises(KeyboardInterrupt):
        pipeline.prune(recipe, output, progress=stop_after(1))
    os.utime(tmp_path / "rows.jsonl", (1, 1))
    refused("rows.jsonl has changed since")
    os.utime(tmp_path / "rows.jsonl", ns=(times.st_atime_ns, times.st_mtime_ns))
    with monkeypatch.context() as patch:
        patch.setattr("torch.get_num_threads", lambda: 64)
        refused("machine threads was 1 and is 64 now")
        patch.setattr("torch.get_num_threads", lambda: 1)
        patch.setattr("compressor.run.fingerprint.versions", lambda: {"torch": "9"})
        refused("version ")
    (model / "generation_config.json").write_text("{}")
    refused("model file generation_config.json has changed since")
    os.utime(sorted(model.glob("*.safetensors"))[0], (1, 1))
    refused("model file model-00001-of-.* has changed since")


@pytest.mark.parametrize(
    "what", ["begin.json", "ids.json", "block-00000.json", "hidden.0-00002", "spool/*", "folder/*"]
)
@pytest.mark.parametrize("damage", ["flipped", "truncated", "gone"])
def test_a_damaged_state_is_refused_and_left_as_it_is(job, unfinished, what, damage):
    path = sorted(work_path(unfinished).glob(what))[0]
    if damage == "gone":
        path.unlink()
        if what in (
            "begin.json",
            "ids.json",
        ):  # without the first nothing counts; the others can be made again
            pipeline.prune(job(), unfinished)
            return
    else:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data if damage == "flipped" else data[: len(data) // 2])
    before = contents_below(work_path(unfinished))
    with pytest.raises(OutputError, match=r"is damaged: .*remove .*\.out\.partial to start anew"):
        pipeline.prune(job(), unfinished)
    assert contents_below(work_path(unfinished)).keys() >= before.keys() - {
        work_path(unfinished) / "lock"
    }
    assert not unfinished.exists()


def test_an_error_in_the_input_leaves_nothing(job, tmp_path, monkeypatch):
    from compressor.errors import NumericalError
    from compressor.model.skeleton import Skeleton

    real = Skeleton.load_block

    def load(self, index, device):
        if index == 2:
            raise NumericalError("weight holds NaN")
        return real(self, index, device)

    monkeypatch.setattr(Skeleton, "load_block", load)
    with pytest.raises(NumericalError):
        pipeline.prune(job(), tmp_path / "new" / "out")
    assert not list(tmp_path.iterdir())


def test_once_is_computed_once(tmp_path):
    made = []

    def make():
        made.append(1)
        return {"q_proj": "2:4", "ratio": 0.1}

    def interrupted():
        with Journal(tmp_path / "out", {}, {}) as journal:
            journal.once("goals", make)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    with Journal(tmp_path / "out", {}, {}) as journal:
        assert journal.once("goals", make) == {"q_proj": "2:4", "ratio": 0.1}
    assert made == [1]
    assert not list(tmp_path.iterdir())


def doubled(batch):
    handed = {("returned", 0, 1): torch.tensor([batch.number, 7])}
    return replace(batch, hidden=batch.hidden * 2 + batch.number, handed=handed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_hidden_states_are_the_same_wherever_they_rest(tmp_path, dtype):
    batches = [
        torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(number)).to(dtype)
        for number in range(5)
    ]
    cpu = torch.device("cpu")
    homes = [Batches(cpu, cpu), Batches(cpu, tmp_path)]
    for own in homes:
        for number, batch in enumerate(batches):
            own.append(Batch(number, batch))
        own.advance(doubled)
    for number, batch in enumerate(batches):
        assert all(torch.equal(own[number].hidden, batch * 2 + number) for own in homes)
        assert all(own[number].handed.keys() == {("returned", 0, 1)} for own in homes)
    saved = [own.save(tmp_path) for own in homes]
    assert saved[0] == saved[1]
    homes[1].forget(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "hidden-00001",
        "hidden.handed.0-00001",
    ]
    for home in (cpu, tmp_path):
        again = Batches(cpu, home)
        again.load(tmp_path, json.loads(json.dumps(saved[0])))
        for one, other in zip(again, homes[0], strict=True):
            assert torch.equal(one.hidden, other.hidden)
            key = ("returned", 0, 1)
            assert torch.equal(one.handed[key], other.handed[key])
            assert one.handed[key].tolist() == [one.number, 7]
        assert torch.equal(again[-1].hidden, again[4].hidden)
        assert len(again[1:3]) == 2
        with pytest.raises(IndexError):
            again[5]


def test_a_run_is_known_while_a_process_is_at_it(tmp_path):
    output = tmp_path / "out"
    assert not is_running(output)
    with Journal(output, {}, {}):
        assert is_running(output)
    assert not is_running(output)
