"""Processes that share a run give the bytes that one process gives; one that dies leaves what the
others can go on from.
"""

import errno
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import traceback
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from compressor.checkpoint.work_state import work_path
from compressor.config.recipe import Recipe
from compressor.engine import blocks, memory
from compressor.engine.distributed import Group
from compressor.errors import CompressError, NumericalError
from compressor.run import pipeline, plan_file
from compressor.run.journal import Journal
from tests.test_experts import never_route
from tests.test_resume import contents, kill_me

CASES = {
    "wanda": {"method": "wanda"},
    "dsnot": {"method": "magnitude", "refine": "dsnot"},
    "sparsegpt": {"method": "sparsegpt"},
    "armor": {"method": "armor", "options": {"iterations": 2, "finish": 1, "block_size": 16}},
    "admm": {"method": "wanda", "refine": "admm"},
    "ratios": {"method": "wanda", "pattern": "50%", "ratios": "owl"},
    "fisher": {"method": "fisher", "pattern": "50%", "keep": "40%"},
    "matched": {"method": "sparsegpt", "match": "0.5"},
    "experts": {"method": "sparsegpt", "family": "qwen3_moe", "expert_tokens": "routed"},
    "experts, wanda": {"method": "wanda", "family": "qwen3_moe", "expert_tokens": "routed"},
}
PORTS = "MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"


@pytest.fixture(autouse=True)
def several_batches(monkeypatch):
    monkeypatch.setattr("compressor.calibration.capture._BATCH_TOKENS", 64)


@pytest.fixture
def recipe(tiny, rows, tmp_path_factory):
    def make(case):
        settings = {"num_samples": 8, "seq_len": 32, **CASES[case]}
        model = tiny(settings.pop("family", "llama"))
        if "experts" in case:
            model = shutil.copytree(model, tmp_path_factory.mktemp("routed") / "model")
            never_route(model)
        return Recipe(model=str(model), dataset=str(rows), **settings)

    return make


def in_processes(size, function):
    """Run `function(rank)` in processes as torchrun starts them; gives their exit codes, 3 for an
    error of ours, and the errors.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(size):
        reader, writer = os.pipe()
        if not (child := os.fork()):
            code = 9
            try:
                torch.set_num_threads(
                    torch.get_num_threads()
                )  # makes the thread pool that a fork loses: two threads would race
                os.environ |= dict(
                    zip(
                        PORTS,
                        ("127.0.0.1", str(port), str(rank), str(size), str(size)),
                        strict=True,
                    )
                )
                function(rank)
                code = 0
            except CompressError as error:
                os.write(writer, str(error).encode())
                code = 3
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        os.close(writer)
        children.append((child, reader))
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child, _ in children]
    return codes, [os.read(reader, 10_000).decode() for _, reader in children]


@pytest.mark.parametrize("case", CASES)
def test_two_processes_write_the_bytes_of_one(recipe, tmp_path, case):
    job = recipe(case)
    codes, said = in_processes(2, lambda rank: pipeline.prune(job, tmp_path / "two"))
    assert codes == [0, 0], said
    pipeline.prune(job, tmp_path / "one")
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_two_processes_with_too_little_memory_write_the_bytes_of_one(monkeypatch, recipe, tmp_path):
    job = recipe("sparsegpt")
    with monkeypatch.context() as patch:
        patch.setattr(
            memory, "_left", lambda job, device, limit: 100
        )  # hidden states on disk, Gram matrices one by one
        codes, said = in_processes(
            2, lambda rank: pipeline.prune(job, tmp_path / "two", max_memory="100GB")
        )
    assert codes == [0, 0], said
    pipeline.prune(job, tmp_path / "one")
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_factors_of_a_plan_are_made_by_several_processes(recipe, tmp_path):
    job = replace(recipe("fisher"), keep="", plan=str(tmp_path / "plan.toml"))
    planned = pipeline.make_plan(recipe("fisher"))
    Path(job.plan).write_text(plan_file.dumps(planned.plan))
    codes, said = in_processes(2, lambda rank: pipeline.prune(job, tmp_path / "two"))
    assert codes == [0, 0], said
    pipeline.prune(job, tmp_path / "one")
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


def test_an_error_in_one_process_is_that_error_in_all_and_nothing_is_left(
    monkeypatch, recipe, tmp_path
):
    job, real = recipe("sparsegpt"), blocks.compress_weight

    def failing(job, task, weight, stats):
        if os.environ["RANK"] == "1" and ".1." in task.linear.name:
            raise NumericalError(f"{task.linear.name}: cannot be factored")
        return real(job, task, weight, stats)

    monkeypatch.setattr(blocks, "compress_weight", failing)
    codes, said = in_processes(2, lambda rank: pipeline.prune(job, tmp_path / "out"))
    assert codes == [3, 3]
    assert said[0] == said[1]
    assert re.fullmatch(r"model\.layers\.1\.\S+: cannot be factored", said[0])
    assert not list(tmp_path.iterdir())


def test_an_error_of_the_first_process_is_one_in_all(monkeypatch, recipe, tmp_path):
    def refused(*_, **__):
        raise NumericalError("no goals")

    monkeypatch.setattr(pipeline, "share_zeros", refused)
    job = recipe("ratios")
    assert in_processes(2, lambda rank: pipeline.prune(job, tmp_path / "out")) == (
        [3, 3],
        ["no goals", "no goals"],
    )


def test_a_disk_that_is_full_ends_all_and_can_be_resumed(monkeypatch, recipe, tmp_path):
    job, output = recipe("wanda"), tmp_path / "out"

    def full(journal, block):
        if len(journal.blocks):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(journal, block)

    real = Journal.record
    with monkeypatch.context() as patch:
        patch.setattr(Journal, "record", full)
        codes, said = in_processes(2, lambda rank: pipeline.prune(job, output))
    assert codes == [3, 3]
    assert "No space left on device; make room or mend it, then: 1 blocks of" in said[0]
    codes, said = in_processes(2, lambda rank: pipeline.prune(job, output))
    assert codes == [0, 0], said
    pipeline.prune(job, tmp_path / "one")
    assert contents(output) == contents(tmp_path / "one")


@given(st.lists(st.integers(1, 1000), max_size=20), st.integers(1, 5))
def test_everything_is_owned_and_the_dearest_weigh_no_more_than_one_too_much(costs, size):
    owners = Group(0, size).owners(costs)
    assert len(owners) == len(costs)
    loads = [
        sum(cost for cost, owner in zip(costs, owners, strict=True) if owner == rank)
        for rank in range(size)
    ]
    assert max(loads) - min(loads) <= max(costs, default=0)


@pytest.mark.parametrize("on_disk", [False, True], ids=["memory", "disk"])
@pytest.mark.parametrize("case", ["wanda", "sparsegpt", "matched"])
def test_one_dies_the_others_say_so_and_the_same_command_goes_on(
    monkeypatch, recipe, tmp_path, case, on_disk
):
    if on_disk:
        monkeypatch.setattr(
            pipeline, "choose_home", lambda job, tokens, device, limit, folder, beside: folder
        )
    job, output, real = recipe(case), tmp_path / "out", pipeline.compress_blocks

    def dying(rank):
        def blocks(*arguments, **options):
            for row in real(*arguments, **options):
                if row.index == 1 and rank == 1:
                    kill_me()
                yield row

        pipeline.compress_blocks = blocks
        pipeline.prune(job, output)

    codes, said = in_processes(2, dying)
    assert codes == [3, -signal.SIGKILL]
    assert re.match("another process of this run is gone: ", said[0])
    assert not output.exists()
    assert len(list(work_path(output).glob("block-*.json"))) == 1
    resumed = []

    def again(rank):
        resumed.append(pipeline.prune(job, output).run["resumed_at_block"])
        assert resumed == [1]

    codes, said = in_processes(2, again)
    assert codes == [0, 0], said
    monkeypatch.undo()
    monkeypatch.setattr("compressor.calibration.capture._BATCH_TOKENS", 64)
    pipeline.prune(job, tmp_path / "one")
    assert contents(output) == contents(tmp_path / "one")


KILLED = """
import os, signal
from compressor.calibration import capture
from compressor.run import pipeline
from compressor.cli import main

capture._BATCH_TOKENS, real = 64, pipeline.compress_blocks

def blocks(*arguments, **options):
    for row in real(*arguments, **options):
        if row.index == 1 and os.environ["RANK"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        yield row

pipeline.compress_blocks = blocks
main()
"""


def test_torchrun_ends_with_one_line_and_the_run_goes_on(recipe, tmp_path):
    (tmp_path / "run.py").write_text(KILLED)
    job, output = recipe("sparsegpt"), tmp_path / "out"
    command = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        tmp_path / "run.py",
        "prune",
        job.model,
        "-o",
        output,
    ]
    options = [
        "--method",
        "sparsegpt",
        "--dataset",
        job.dataset,
        "--num-samples",
        8,
        "--seq-len",
        32,
        "--quiet",
    ]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        list(map(str, [sys.executable, *command, *options])),
        env=environment,
        capture_output=True,
        text=True,
    )
    assert ran.returncode != 0
    lines = [line for line in ran.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, ran.stderr
    assert re.match(
        r"error: another process of this run is gone: .*; 1 blocks of \S+ are done: the same "
        r"command, or",
        lines[0],
    )
    codes, said = in_processes(2, lambda rank: pipeline.prune(job, output))
    assert codes == [0, 0], said
    pipeline.prune(job, tmp_path / "one")
    assert contents(output) == contents(tmp_path / "one")
