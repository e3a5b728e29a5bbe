"""Kill runs at random moments, let the same command go on, and compare the result with an
uninterrupted run.

    python benchmarks/kills.py --kills 200              # SIGKILL over methods and formats
    # a disk that is full after a random number of bytes (root: mounts tmpfs)
    python benchmarks/kills.py --kills 0 --full 40

A tiny random model makes a run short; runs are forked from a process that has imported the
libraries. After every kill nothing may be there under the name of the output unless it is complete.
One line per case, with the number of kills, in how many of them work was there to go on with, and
how many results were not byte-identical.
"""

from __future__ import annotations

import argparse
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from compressor.checkpoint.work_state import report_path, work_path
from compressor.config.recipe import Recipe
from compressor.errors import OutputError
from compressor.run import pipeline

CASES = {
    "magnitude, packed": {"method": "magnitude"},
    "wanda, packed": {"method": "wanda"},
    "wanda 4:8, dense": {"method": "wanda", "pattern": "4:8", "format": "dense"},
    "wanda 60%, hidden states on disk": {"method": "wanda", "pattern": "60%", "on_disk": True},
    "sparsegpt + admm": {"method": "sparsegpt", "refine": "admm"},
    "magnitude + dsnot": {"method": "magnitude", "refine": "dsnot"},
    "wanda + tuning": {"method": "wanda", "tune": 1},
    "wanda + tuning, on disk": {"method": "wanda", "tune": 1, "on_disk": True},
    "armor": {"method": "armor", "options": {"iterations": 3, "finish": 1}},
}


def make_model(folder: Path) -> None:
    """A random bf16 Llama of three blocks in several shards."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
    }
    config = LlamaConfig(
        vocab_size=128, num_key_value_heads=2, max_position_embeddings=256, **sizes
    )
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder, max_shard_size="60KB")
    rows = torch.randint(3, 128, (64, 64), generator=torch.Generator().manual_seed(1)).tolist()
    (folder.parent / "rows.jsonl").write_text("".join(f'{{"input_ids": {row}}}\n' for row in rows))


def recipe(root: Path, case: dict) -> Recipe:
    settings = {key: value for key, value in case.items() if key != "on_disk"}
    return Recipe(
        model=str(root / "model"),
        dataset=str(root / "rows.jsonl"),
        num_samples=64,
        seq_len=64,
        **settings,
    )


def start(root: Path, case: dict, output: Path) -> int:
    """Fork a run; its exit code is 0, 1 where the output could not be written, 2 for everything
    else.
    """
    if child := os.fork():
        return child
    code = 2
    try:
        if case.get("on_disk"):
            pipeline.choose_home = lambda job, tokens, device, limit, folder, beside: folder
        pipeline.prune(recipe(root, case), output)
        code = 0
    except OutputError as error:
        code = 1
        if "No space left on device" not in str(error):
            print(error, file=sys.stderr, flush=True)
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def cpu_seconds(child: int) -> float:
    """What a run has computed so far; much for one that has ended. On a busy machine the clock says
    little.
    """
    fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
    return (
        float("inf")
        if fields[0] == "Z"
        else (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    )


def ended(child: int) -> int:
    """The exit code of a run, negative where a signal ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def check(output: Path, expected: dict[str, bytes], counts: Counter) -> None:
    if contents(output) != expected:
        counts["different"] += 1
        print(f"{output} differs from the uninterrupted run", file=sys.stderr, flush=True)


def clear(output: Path) -> None:
    shutil.rmtree(output, ignore_errors=True)
    shutil.rmtree(work_path(output), ignore_errors=True)
    report_path(output).unlink(missing_ok=True)


def unfinished(output: Path) -> bool:
    """Whether there is work to go on with."""
    return (work_path(output) / "begin.json").exists()


def kill_until(
    root: Path, case: dict, output: Path, seconds: float, kills: int, dice: random.Random
) -> Counter:
    """Kill runs of one case `kills` times."""
    counts: Counter = Counter()
    expected = contents(output)
    clear(output)
    while counts["kills"] < kills:
        child = start(root, case, output)
        moment = dice.uniform(0, seconds)
        while cpu_seconds(child) < moment:
            time.sleep(0.001)
        os.kill(child, signal.SIGKILL)
        if ended(child) == -signal.SIGKILL:
            counts["kills"] += 1
            counts["with finished blocks"] += any(work_path(output).glob("block-*.json"))
            counts["while naming"] += (work_path(output) / "complete.json").exists()
            if output.exists():
                check(output, expected, counts)
        if dice.random() < 0.5 or counts["kills"] == kills or output.exists():
            if unfinished(output) or not output.exists():
                counts["failed"] += ended(start(root, case, output)) != 0
            counts["results compared"] += 1
            check(output, expected, counts)
            counts["left behind"] += unfinished(output)
            clear(output)
    return counts


def fill_until(root: Path, case: dict, mount: Path, runs: int, dice: random.Random) -> Counter:
    """Let the disk be full after a random number of bytes, then make a little room, until the run
    gets through.
    """
    counts: Counter = Counter()
    output = mount / "out"
    resize(mount, 64 << 20)
    assert ended(start(root, case, output)) == 0
    expected, needed = contents(output), sum(map(len, contents(output).values()))
    clear(output)
    import compressor.run.check

    compressor.run.check.check_output = lambda output, reader: (
        None
    )  # it would say at once that there is too little room
    for _ in range(runs):
        size = dice.randrange(8 << 10, 2 * needed)
        while True:
            resize(mount, size)
            code = ended(start(root, case, output))
            if code == 0:
                break
            counts["full disks"] += 1
            counts["failed"] += code != 1
            counts["with finished blocks"] += any(work_path(output).glob("block-*.json"))
            assert not output.exists()
            size += dice.randrange(4 << 10, needed // 2)
        counts["results compared"] += 1
        check(output, expected, counts)
        clear(output)
    return counts


def resize(mount: Path, size: int) -> None:
    subprocess.run(["mount", "-o", f"remount,size={size}", mount], check=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument(
        "--full", type=int, default=0, help="results to make on a disk that runs full"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", action="append", choices=CASES)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    dice, cases = random.Random(arguments.seed), arguments.case or list(CASES)
    print(
        f"torch {torch.__version__}, python {platform.python_version()}, {platform.machine()}",
        flush=True,
    )
    total: Counter = Counter()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        _in_child(make_model, root / "model")  # a process that has computed should not be forked
        import transformers.models.llama.modeling_llama  # noqa: F401  # once, here, and not in every run

        for number, name in enumerate(cases):
            clear(root / "out")
            before = os.times()
            assert ended(start(root, CASES[name], root / "out")) == 0
            seconds = sum(os.times()[2:4]) - sum(before[2:4])  # of finished children
            share = arguments.kills * (number + 1) // len(cases) - arguments.kills * number // len(
                cases
            )
            counts = (
                kill_until(root, CASES[name], root / "out", 1.02 * seconds, share, dice)
                if share
                else Counter()
            )
            if arguments.full:
                counts += _on_small_disk(root, CASES[name], -(-arguments.full // len(cases)), dice)
            total += counts
            print(f"{name} ({seconds:.2f} s of CPU a run): {dict(counts)}", flush=True)
    print(f"in all: {dict(total)}", flush=True)
    sys.exit(bool(total["different"] or total["failed"] or total["left behind"]))


def _in_child(function, *arguments) -> None:
    child = os.fork()
    if not child:
        function(*arguments)
        os._exit(0)
    assert ended(child) == 0


def _on_small_disk(root: Path, case: dict, runs: int, dice: random.Random) -> Counter:
    mount = root / "disk"
    mount.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "tmpfs", mount], check=True)
    try:
        return fill_until(root, case, mount, runs, dice)
    finally:
        subprocess.run(["umount", mount], check=True)


if __name__ == "__main__":
    main()
