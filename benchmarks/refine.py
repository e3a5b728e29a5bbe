"""Perplexity of every refinement after every method, on real trained models: the table of
docs/refine.md.

    # all cases; needs the canary models
    python benchmarks/refine.py
    python benchmarks/refine.py --model books-1m --pattern 2:4 --case sparsegpt+admm
    # seconds and memory for one linear of 4096 x 11008
    python benchmarks/refine.py --speed 4096 11008

Protocol: 128 calibration rows of full context (--samples), everything in float32, only the linears
inside the decoder blocks, their statistics from the compressed blocks before them. A case is
METHOD[+REFINEMENT]…; `+tune` at its end trains the block (compressor/engine/block_tuning.py).
`matched:` in front of it is a run of `compressor.prune` with `match='0.5'`, `auto:` one with
`match='auto'`, for which a tenth as many rows have to be left: --samples 116. Each case writes one
JSON line to standard output, the table comes last. The folders of models and token rows are given
by --models and --data, or COMPRESS_SHARED names their parent.
"""

from __future__ import annotations

import argparse
import copy
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from common import SHARED, TESTS, emit
from torch import Tensor, nn

import compressor
from compressor.calibration import capture, tokens
from compressor.checkpoint.reader import Reader
from compressor.engine.block_tuning import Arguments, tune
from compressor.evaluation import perplexity
from compressor.formats.dense import Dense
from compressor.methods import method_module
from compressor.model.skeleton import Skeleton
from compressor.pattern import Pattern
from compressor.refine import refinement
from compressor.stats import InputStats, collecting, output_error

METHODS = ["magnitude", "wanda", "sparsegpt"]
REFINEMENTS = ["", "+dsnot", "+lsq", "+swap", "+admm"]
CASES = [
    "dense",
    *(m + r for r in REFINEMENTS for m in METHODS),
    "matched:sparsegpt+lsq",
    "matched:sparsegpt+admm",
]
CASES += [
    "wanda+tune",
    "sparsegpt+tune",
    "wanda+admm+tune",
    "sparsegpt+admm+tune",
    "matched:sparsegpt+admm+tune",
]

CASES += ["wanda+dsnot-published", "wanda+dsnot-attention"]
STRENGTHS = {"matched": "0.5", "auto": "auto"}
TUNE: dict[str, float] = {}


@dataclass
class Canary:
    """A trained model, its calibration states entering block 0 and its test rows."""

    name: str
    model: nn.Module
    path: str  # of the decoder blocks
    rows: Path  # of the calibration
    states: capture.States
    test: list[Tensor]


def load(name: str, models: Path, rows: Path, samples: int) -> Canary:
    from transformers import AutoModelForCausalLM

    folder = models / name
    skeleton = Skeleton(Reader(folder), dtype=torch.float32)
    vocabulary, length = skeleton.config.vocab_size, tokens.context_length(skeleton.config)
    assert length
    calibration = rows / f"{name}-calib.jsonl"
    ids = tokens.calibration_rows(
        str(calibration),
        folder,
        vocabulary,
        num_samples=samples,
        seq_len=length,
        seed=0,
    )
    test = tokens.evaluation_rows(
        str(rows / f"{name}-{TESTS[name]}.jsonl"), folder, vocabulary, seq_len=length
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    states = capture.capture(skeleton, ids, torch.device("cpu"))
    return Canary(name, model, skeleton.path, calibration, states, test)


# --- one case


def run(canary: Canary, case: str, pattern: Pattern) -> dict[str, object]:
    """Compress a copy of the model and score it."""
    started, shares, model = time.process_time(), [], canary.model
    aim, _, steps = case.rpartition(":")
    if aim:
        model, shares = pruned_by_product(canary, STRENGTHS[aim], steps, pattern)
    elif case != "dense":
        model, shares = pruned_here(canary, steps, pattern)
    seconds = time.process_time() - started
    score = perplexity(model, canary.test)
    mean = sum(shares) / len(shares) if shares else 0.0
    return {
        "model": canary.name,
        "pattern": str(pattern),
        "case": case,
        "ppl": score,
        "output_error": mean,
        "seconds": round(seconds, 1),
    }


def pruned_by_product(
    canary: Canary, strength: str, steps: str, pattern: Pattern
) -> tuple[nn.Module, list[float]]:
    """What `compressor.prune` makes of the model in float32, and the output errors it reports."""
    from transformers import AutoModelForCausalLM

    method, _, refine = steps.removesuffix("+tune").partition("+")
    asked = {"method": method, "pattern": str(pattern), "match": strength, "format": "dense"}
    asked |= {"refine": refine} if refine else {}
    asked |= {"tune": int(TUNE.get("epochs", 4))} if steps.endswith("+tune") else {}
    length = canary.states.ids[0].shape[1]
    samples = sum(len(ids) for ids in canary.states.ids)
    with TemporaryDirectory() as folder:
        canary.model.save_pretrained(f"{folder}/float32")
        report = compressor.prune(
            f"{folder}/float32", f"{folder}/out", dataset=canary.rows, num_samples=samples,
            seq_len=length, device="cpu", **asked,
        )  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(f"{folder}/out", dtype=torch.float32)
    return model.eval(), [row.error for row in report.linears if row.error is not None]


def pruned_here(canary: Canary, case: str, pattern: Pattern) -> tuple[nn.Module, list[float]]:
    """A copy of the model, pruned block by block, and the output errors of its linears."""
    model, shares = copy.deepcopy(canary.model), []
    steps, tuned = case.removesuffix("+tune").split("+"), case.endswith("+tune")
    hidden = exact = list(canary.states.hidden)
    for index, block in enumerate(model.get_submodule(canary.path)):
        arguments = canary.states.arguments[index]
        if tuned:
            exact = [capture.run(block, batch, arguments) for batch in exact]
        shares += prune_plain(block, hidden, arguments, steps, pattern)
        if tuned:
            forms = {
                f"{name}.weight": Dense(linear.weight.detach())
                for name, linear in linears_of(block).items()
            }
            for name, form in tune(block, forms, hidden, exact, arguments, **TUNE)[0].items():
                block.get_parameter(name).data = form.dense()
        hidden = [capture.run(block, batch, arguments) for batch in hidden]
    return model, shares


def linears_of(block: nn.Module) -> dict[str, nn.Linear]:
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


def prune_plain(
    block: nn.Module, hidden: list[Tensor], arguments: Arguments, steps: list[str], pattern: Pattern
) -> list[float]:
    """Every linear of a block from one pass of statistics; gives their relative output errors."""
    linears = linears_of(block)
    with collecting(linears, gram=True, moments=True) as stats:
        for batch in hidden:
            capture.run(block, batch, arguments)
    return [
        prune(name, linear, linear.weight.data, stats[name], steps, pattern)
        for name, linear in linears.items()
    ]


def prune(
    name: str,
    linear: nn.Linear,
    weight: Tensor,
    stats: InputStats,
    steps: list[str],
    pattern: Pattern,
) -> float:
    method, *refinements = steps
    pruned = method_module(method).compress(weight, stats, pattern).dense()
    for step in refinements:
        step, _, variant = step.partition("-")
        if variant == "attention" and "attn" not in name:
            continue
        options = {"same_sign": False} if variant == "published" else {}
        pruned = refinement(step).refine(weight, pruned, stats, pattern, **options)
    assert pattern.is_legal(pruned)
    share = output_error(weight, pruned, stats)
    linear.weight.data = pruned
    return share


# --- speed


def speed(rows: int, columns: int, device: str) -> None:
    """Seconds of each refinement of one linear with random inputs."""
    generator = torch.Generator().manual_seed(0)
    stats = InputStats(columns, gram=True, moments=True, device=device)
    for _ in range(8):
        x = torch.randn(columns // 4 + 1, columns, generator=generator).to(device)
        stats.update(x + 0.5 * x.roll(1, 1) + 0.1)
    weight = torch.randn(rows, columns, generator=generator).to(device)
    pattern = Pattern.parse("2:4")
    pruned = method_module("wanda").compress(weight, stats, pattern).dense()
    cuda = device.startswith("cuda")
    clock = (
        time.perf_counter if cuda else time.process_time
    )  # on the CPU other processes do not count
    for name in ("dsnot", "lsq", "swap", "admm"):
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        started = clock()
        refined = refinement(name).refine(weight, pruned, stats, pattern)
        error = output_error(weight, refined, stats)  # waits for the device
        row = {"refinement": name, "rows": rows, "columns": columns, "output_error": error}
        peak = {"peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2)} if cuda else {}
        emit({**row, "seconds": round(clock() - started, 2), **peak})


def table(results: list[dict[str, object]]) -> str:
    """One row a case, one column a model and pattern."""
    columns = list(dict.fromkeys((row["model"], row["pattern"]) for row in results))
    found = {(row["case"], row["model"], row["pattern"]): row["ppl"] for row in results}
    lines = [
        "| case | " + " | ".join(f"{model} {pattern}" for model, pattern in columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for case in dict.fromkeys(row["case"] for row in results):
        cells = [found.get((case, *column)) for column in columns]
        lines.append(
            f"| {case} | "
            + " | ".join("–" if cell is None else f"{cell:.3f}" for cell in cells)
            + " |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", nargs="+", default=["babyllama105", "books-1m"], choices=list(TESTS)
    )
    parser.add_argument("--pattern", nargs="+", default=["2:4", "50%"])
    parser.add_argument("--case", nargs="+", default=CASES)
    parser.add_argument("--epochs", type=int, help="of +tune")
    parser.add_argument("--rate", type=float, help="of +tune")
    parser.add_argument("--samples", type=int, default=128, help="rows of the calibration")
    parser.add_argument("--models", type=Path, default=SHARED / "models")
    parser.add_argument("--data", type=Path, default=SHARED / "data" / "canary")
    parser.add_argument("--speed", nargs=2, type=int, metavar=("ROWS", "COLUMNS"))
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of --speed"
    )
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    TUNE.update(
        {
            name: value
            for name in ("epochs", "rate")
            if (value := getattr(arguments, name)) is not None
        }
    )
    if arguments.speed:
        return speed(*arguments.speed, arguments.device)
    results = []
    for name in arguments.model:
        canary = load(name, arguments.models, arguments.data, arguments.samples)
        for text in arguments.pattern:
            pattern = Pattern.parse(text)
            for case in arguments.case:
                if "+swap" in case and not pattern.m:
                    continue
                results.append(run(canary, case, pattern))
                emit(results[-1])
    print(table(results))


if __name__ == "__main__":
    with torch.no_grad():
        main()
