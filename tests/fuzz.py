"""A mutating fuzzer: damaged folders and recipes through every command that reads them.

    python tests/fuzz.py --seconds 3600                 # from the root of the repository
    python tests/fuzz.py --seed 1 --case 4711           # one case again, with what it printed

Each case runs in a process of its own and must end within a time limit as success or as one line of
error with exit code 1 or 2, with no traceback, without a memory peak far above its input's size,
with the input as it was and no file but the output.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from tests.mutate import damage, damaged_recipe  # noqa: E402  # found by the line above

LIMIT_SECONDS = 60  # of processor time; ten times that by the clock, for the machine may be busy
LIMIT_BYTES = (
    1 << 30
)  # of address space beyond what the process began with; the models have a few hundred kilobytes
TARGETS = ("inspect", "plan", "prune", "recipe", "unpack", "pack", "import", "load")
_MODEL = dict(
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=64,
    max_position_embeddings=64,
)


def preload() -> None:
    """Import here what the cases need, so that a case costs a fork and not an import."""
    from importlib import import_module

    for name in ("cli", "runtime", "tools.import_bitmask", "tools.pack", "tools.unpack"):
        import_module(f"compressor.{name}")
    from compressor.cli.show import quiet_libraries

    quiet_libraries(False)


def make_bases(folder: Path) -> dict[str, list[Path]]:
    """Small intact folders by target: families, one and several shards, packed forms, foreign
    formats.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from compressor.config.recipe import Recipe
    from compressor.run.pipeline import prune
    from tests.test_pack import legacy

    (folder / "rows.jsonl").write_text(
        "".join(json.dumps({"input_ids": [row] * 8}) + "\n" for row in range(3, 7))
    )
    experts = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, head_dim=8)
    small = dict(
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        vocab_size=64,
        bos_token_id=1,
        eos_token_id=1,
    )
    plain = []
    for family, settings in [
        ("llama", _MODEL),
        ("gpt2", small),
        ("qwen3_moe", {**_MODEL, **experts}),
    ]:
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(family, **settings), dtype=torch.bfloat16
        )
        model.save_pretrained(folder / family, max_shard_size="20KB" if family != "gpt2" else "1GB")
        plain.append(folder / family)

    def pruned(name: str, model: Path, **settings: Any) -> Path:
        settings = {
            "dataset": str(folder / "rows.jsonl"),
            "num_samples": 4,
            "seq_len": 8,
            **settings,
        }
        prune(Recipe(str(model), **settings), folder / name)
        return folder / name

    llama, gpt2, moe = plain
    armor = {
        "method": "armor",
        "options": {"block_size": 8, "overhead": 0.9, "iterations": 1, "finish": 0},
    }
    packed = [
        pruned("packed", llama, method="magnitude"),
        pruned("packed-gpt2", gpt2, method="magnitude"),
        pruned("packed-moe", moe, method="magnitude"),
        pruned("armor", llama, **armor),
    ]
    dense = [pruned("dense", model, method="magnitude", format="dense") for model in (llama,)]
    old = [legacy(dense[0], folder / "legacy")]
    every = [*plain, *packed, *dense, *old]
    return {"inspect": every, "plan": plain, "prune": plain, "recipe": [llama], "unpack": packed,
    "pack": [*dense, *plain],
            "import": old, "load": [*packed, *plain]}  # fmt: skip


def command(random: Random, target: str, case: Path, rows: Path) -> list[str] | None:
    """The command line of a case; None where a Python function is called."""
    model, out = str(case / "in"), str(case / "out")
    calibrated = [
        "--method",
        random.choice(["wanda", "sparsegpt"]),
        "--dataset",
        str(rows),
        "--num-samples",
        "2",
        "--seq-len",
        "8",
    ]
    return {
        "inspect": ["inspect", model, *random.choice([[], ["--json"]])],
        "plan": ["prune", model, "-o", out, "--dry-run"],
        "prune": [
            "prune",
            model,
            "-o",
            out,
            "-q",
            *random.choice([["--method", "magnitude"], calibrated]),
        ],
        "recipe": ["prune", model, "-o", out, "-q", "--recipe", str(case / "in" / "recipe.toml")],
        "unpack": ["unpack", model, "-o", out],
        "pack": ["pack", model, "-o", out, *random.choice([[], ["--json"]])],
        "import": ["import", model, "-o", out],
    }.get(target)


def child(arguments: list[str] | None, case: Path) -> None:
    """Run the case in this process; never returns."""
    from compressor.errors import CompressError

    text = os.open(case.parent / "printed", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(text, 1)
    os.dup2(text, 2)
    resource.setrlimit(resource.RLIMIT_AS, (address_space() + 16 * LIMIT_BYTES,) * 2)
    resource.setrlimit(resource.RLIMIT_CPU, (LIMIT_SECONDS,) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 28,) * 2)
    os.environ["TMPDIR"] = os.environ["HOME"] = str(case)
    tempfile.tempdir = None
    os.chdir(case)
    code = 0
    try:
        if arguments is None:
            import torch

            import compressor

            try:
                compressor.load(case / "in")(torch.arange(3, 9)[None])
            except CompressError as error:
                print(f"error: {error}", file=sys.stderr)
                code = error.exit_code
        else:
            from compressor.cli import main

            sys.argv = ["compress", *arguments]
            main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        import traceback

        traceback.print_exc()
        code = 99
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def address_space(pid: int | str = "self", field: str = "VmSize") -> int:
    """Bytes of address space of a process: now, or with `VmPeak` its highest."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0


def run_case(
    seed: int,
    number: int,
    bases: dict[str, list[Path]],
    targets: list[str],
    place: Path,
    rows: Path,
) -> tuple[dict[str, Any], str]:
    """One case; returns what it was and how it ended, and what it printed. `problem` is None where
    all is well.
    """
    random = Random(f"{seed}-{number}")
    target = random.choice(targets)
    base = random.choice(bases[target])
    case = place / "case"
    shutil.rmtree(case, ignore_errors=True)
    shutil.copytree(base, case / "in")
    if target == "recipe":
        (case / "in" / "recipe.toml").write_bytes(damaged_recipe(random))
        done = "recipe"
    else:
        done = damage(random, case / "in")
    before = {path: path.read_bytes() for path in case.rglob("*") if path.is_file()}
    arguments = command(random, target, case, rows)
    ended, pid = time.monotonic() + 10 * LIMIT_SECONDS, os.fork()
    if not pid:
        child(arguments, case)
    began, most = address_space(pid), 0
    while True:
        finished, status = os.waitpid(pid, os.WNOHANG)
        if finished:
            break
        most = max(most, address_space(pid, "VmPeak") - began)
        if time.monotonic() > ended:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            status = -1
            break
        time.sleep(0.005)
    printed = (place / "printed").read_text(errors="replace")
    after = {path: path.read_bytes() for path in case.rglob("*") if path.is_file()}
    problem, outcome = judge(status, most, printed, case, before, after)
    return {
        "seed": seed,
        "case": number,
        "target": target,
        "base": base.name,
        "damage": done,
        "outcome": outcome,
        "problem": problem,
    }, printed


def judge(
    status: int,
    most: int,
    printed: str,
    case: Path,
    before: dict[Path, bytes],
    after: dict[Path, bytes],
) -> tuple[str | None, str]:
    """What is wrong with how a case ended, if anything, and `success` or `error`."""
    if status == -1 or (
        os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL)
    ):
        return f"no end within {LIMIT_SECONDS} s", "hang"
    if os.WIFSIGNALED(status):
        return f"killed by signal {os.WTERMSIG(status)}", "crash"
    code = os.WEXITSTATUS(status)
    errors = [line for line in printed.splitlines() if line.startswith("error: ")]
    if "Traceback" in printed or code not in (0, 1, 2):
        return (
            f"exit {code}: {printed.strip().splitlines()[-1][:300] if printed.strip() else ''}",
            "traceback",
        )
    if code and len(errors) != 1 and "Usage: " not in printed:
        return f"exit {code} with {len(errors)} lines of error", "error"
    if errors and (not code or printed.rstrip().splitlines()[-1] != errors[0].rstrip()):
        return f"exit {code}, but the error is not the last line", "error"
    if errors and len(errors[0]) > 1200:
        return f"an error of {len(errors[0])} characters", "error"
    if most > LIMIT_BYTES or "can't allocate memory" in printed:
        return f"{most:,} bytes of address space", "memory"
    if any(after.get(path) != data for path, data in before.items()):
        return "the input was changed", "files"
    own = (case / "out", case / "out.report.json")
    strange = [
        path
        for path in after
        if path not in before and path not in own and own[0] not in path.parents
    ]
    if strange or (code and any(path.exists() for path in own)):
        return f"left behind: {strange[:3] or own[0]}", "files"
    return None, "error" if code else "success"


def main() -> int:
    """Run cases until the time is over; exit code 1 if any ended badly."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--cases", type=int, default=1 << 60, help="at most so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="run this one again and show what it printed")
    parser.add_argument("--targets", default=",".join(TARGETS))
    parser.add_argument("--log", type=Path, help="JSON line of each case that ended badly")
    options = parser.parse_args()
    targets = options.targets.split(",")
    with tempfile.TemporaryDirectory(prefix="fuzz-") as name:
        place = Path(name)
        (place / "bases").mkdir()
        preload()
        bases, rows = make_bases(place / "bases"), place / "bases" / "rows.jsonl"
        if options.case is not None:
            found, printed = run_case(options.seed, options.case, bases, targets, place, rows)
            print(printed, json.dumps(found, indent=1), sep="\n")
            return bool(found["problem"])
        began, counts, bad = time.monotonic(), Counter(), 0
        number = 0
        while number < options.cases and time.monotonic() - began < options.seconds:
            found, _ = run_case(options.seed, number, bases, targets, place, rows)
            counts[found["target"], found["outcome"]] += 1
            number += 1
            if found["problem"]:
                bad += 1
                print(json.dumps(found), flush=True)
                if options.log:
                    with options.log.open("a") as log:
                        log.write(json.dumps(found) + "\n")
        print(f"{number} cases in {time.monotonic() - began:.0f} s, {bad} ended badly")
        for (target, outcome), count in sorted(counts.items()):
            print(f"  {target:8} {outcome:9} {count}")
    return bool(bad)


if __name__ == "__main__":
    sys.exit(main())
