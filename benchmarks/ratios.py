"""Perplexity of layer ratios on real trained models: the tables of docs/ratios.md.

    # all rows; needs the canary models
    python benchmarks/ratios.py --results ratios.jsonl
    python benchmarks/ratios.py --model books-1m --method wanda      # some of them
    # the tables from the rows that are there
    python benchmarks/ratios.py --results ratios.jsonl --table

Protocol: 128 calibration rows of full context, everything in float32, statistics of a block from
the compressed blocks before it; perplexity on held-out text. Every plan has the same number of
zeros. `KL` is what the guard of the command line compares: calibration divergence from the dense
model; plans that it would refuse are marked with ×. One JSON line a row goes to the results file;
rows that it holds already are not run again, so a run can be interrupted, and several may share a
file. The folders of models and token rows are given by --models and --data, or COMPRESS_SHARED
names their parent.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from common import SHARED, TESTS, emit, read
from torch import Tensor, nn

from compressor.allocation.guard import Trial
from compressor.allocation.sparsity import allocator, leave_dense
from compressor.allocation.sparsity.choose import with_zeros
from compressor.calibration import tokens
from compressor.calibration.capture import States
from compressor.config.recipe import Recipe
from compressor.engine.blocks import compress_blocks
from compressor.engine.plan import Plan
from compressor.evaluation import perplexity
from compressor.pattern import Pattern
from compressor.progress import silent
from compressor.refine import refinement
from compressor.run.check import plan_run
from compressor.run.pipeline import calibrate

MODELS = ["babyllama105", "books-1m"]
RATIOS: dict[str, tuple[str, dict[str, Any]]] = {
    "uniform": ("uniform", {}),
    "owl": ("owl", {}),
    "ecoflap first": ("ecoflap", {}),
    "ecoflap zeroth": ("ecoflap", {"score": "zeroth"}),
    "curve": ("curve", {}),
}
FRACTIONS = ["", "10%", "20%"]
CPU = torch.device("cpu")
KEY = ("model", "method", "refine", "pattern", "ratios")


@dataclass
class Case:
    """One model and method, loaded once; plans and divergences of uniform are shared by the
    rows.
    """

    name: str
    method: str
    plan: Plan
    states: States
    model: nn.Module
    test: list[Tensor]
    trial: Trial
    shares: dict[tuple[str, str], dict[str, int]] = field(default_factory=dict)
    plain: dict[tuple[str, str], float] = field(default_factory=dict)


def load(name: str, method: str, models: Path, rows: Path) -> Case:
    from transformers import AutoModelForCausalLM

    folder = models / name
    recipe = Recipe(
        str(folder),
        method=method,
        pattern="50%",
        dtype="float32",
        dataset=str(rows / f"{name}-calib.jsonl"),
    )
    plan = plan_run(recipe, None)
    states = calibrate(plan, recipe, CPU)
    test = tokens.evaluation_rows(
        str(rows / f"{name}-{TESTS[name]}.jsonl"),
        folder,
        plan.skeleton.config.vocab_size,
        seq_len=plan.seq_len,
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return Case(name, method, plan, states, model, test, Trial(plan, states, CPU))


def run(case: Case, refine: str, pattern: str, ratios: str) -> dict[str, Any]:
    """One row: plan, compress, score."""
    started = time.process_time()
    plan = replace(case.plan, refine=refinement(refine) if refine else None)
    goal = Pattern.parse(pattern)
    even = plan.with_targets({task.linear.name: goal for task in plan.every}, "")
    if goal.m:
        plain, planned = even, left_dense(case, even, ratios)
    else:
        plain, planned = (
            with_zeros(even, shares(case, even, goal, name)) for name in ("uniform", ratios)
        )
    if (refine, pattern) not in case.plain:
        case.plain[refine, pattern] = case.trial.divergence(plain)
    first = case.plain[refine, pattern]
    found = first if ratios in ("uniform", "") else case.trial.divergence(planned)
    return {
        "kl": found,
        "kl_plain": first,
        "ppl": score(case, planned),
        "seconds": round(time.process_time() - started, 1),
    }


def shares(case: Case, plan: Plan, goal: Pattern, ratios: str) -> dict[str, int]:
    key = (str(goal), ratios)
    if key not in case.shares:
        name, options = RATIOS[ratios]
        zeros = int(goal.sparsity * sum(task.linear.size for task in plan.every))
        case.shares[key], _ = allocator(name).allocate(
            plan, zeros, case.states, CPU, silent, **options
        )
        assert sum(case.shares[key].values()) == zeros
    return case.shares[key]


def left_dense(case: Case, plan: Plan, fraction: str) -> Plan:
    if not fraction:
        return plan
    kept, _ = leave_dense.select(
        plan, Fraction(fraction.removesuffix("%")) / 100, case.states, CPU, silent
    )
    return plan.with_targets(
        {
            task.linear.name: None if task.linear.name in kept else task.target
            for task in plan.every
        },
        "",
    )


def score(case: Case, plan: Plan) -> float:
    """Perplexity of the model with the linears of `plan` compressed."""
    parameters = {
        name: module.weight
        for name, module in case.model.named_modules()
        if isinstance(module, nn.Linear)
    }
    original = {task.linear.name: parameters[task.linear.name].data for task in case.plan.every}
    states = case.states.first(len(case.states.hidden))

    def store(task: Any, form: Any, seen: Any) -> None:
        parameters[task.linear.name].data = form.dense().float()

    for _ in compress_blocks(plan, states, CPU, store, silent):
        pass
    found = perplexity(case.model, case.test)
    for name, weight in original.items():
        parameters[name].data = weight
    return found


def rows(arguments: argparse.Namespace) -> Iterator[tuple[str, str, str, str, str]]:
    for model in arguments.model:
        for method in arguments.method:
            for pattern in arguments.pattern:
                for refine in arguments.refine if ":" not in pattern else [""]:
                    for ratios in FRACTIONS if ":" in pattern else arguments.ratios:
                        yield model, method, refine, pattern, ratios


def measure(arguments: argparse.Namespace) -> None:
    case: Case | None = None
    for row in rows(arguments):
        if row in read(arguments.results, KEY):
            continue
        if case is None or (case.name, case.method) != row[:2]:
            case = load(*row[:2], arguments.models, arguments.data)
        found = dict(zip(KEY, row, strict=True)) | run(case, *row[2:])
        emit(found, arguments.results)


def tables(found: dict[tuple[str, ...], dict[str, Any]]) -> str:
    """Per model: a row for method, refinement and ratios, a column for each pattern; and the n:m
    rows.
    """
    lines: list[str] = []
    for model in [name for name in MODELS if any(key[0] == name for key in found)]:
        for grouped in (False, True):
            mine = {
                key: row
                for key, row in found.items()
                if key[0] == model and (":" in key[3]) is grouped
            }
            if not mine:
                continue
            patterns = sorted({key[3] for key in mine})
            lines += ["", f"**{model}**" + (", linears left dense" if grouped else ""), ""]
            heads = [f"{pattern} {what}" for pattern in patterns for what in ("ppl", "KL")]
            lines += [f"| | {' | '.join(heads)} |", "|---|" + "---:|" * len(heads)]
            order = [*FRACTIONS, *RATIOS]
            cases = {(key[1], key[2], key[4]) for key in mine}
            for method, refine, ratios in sorted(
                cases, key=lambda case: (case[0], case[1], order.index(case[2]))
            ):
                cells = [
                    cell
                    for pattern in patterns
                    for cell in _cells(mine.get((model, method, refine, pattern, ratios)))
                ]
                name = f"{method}{'+' * bool(refine)}{refine}, {ratios or 'none'}"
                lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cells(row: dict[str, Any] | None) -> list[str]:
    if row is None:
        return ["–", "–"]
    refused = row["ratios"] not in ("uniform", "") and row["kl"] >= row["kl_plain"]
    return [f"{row['ppl']:.2f}", f"{row['kl']:.3f}{' ×' * refused}"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--method", nargs="+", default=["wanda", "sparsegpt"])
    parser.add_argument("--refine", nargs="+", default=["", "dsnot"])
    parser.add_argument("--pattern", nargs="+", default=["50%", "60%", "70%", "2:4"])
    parser.add_argument("--ratios", nargs="+", default=list(RATIOS), choices=list(RATIOS))
    parser.add_argument("--results", type=Path, default=Path("ratios.jsonl"))
    parser.add_argument("--models", type=Path, default=SHARED / "models")
    parser.add_argument("--data", type=Path, default=SHARED / "data" / "canary")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--table",
        action="store_true",
        help="print the tables of the results file and do nothing else",
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if not arguments.table:
        measure(arguments)
    print(tables(read(arguments.results, KEY)))


if __name__ == "__main__":
    main()
