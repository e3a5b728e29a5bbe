"""Perplexity of low-rank factors on real trained models, and what the decomposition costs: the
tables of docs/lowrank.md.

    # all rows; needs the canary models
    python benchmarks/lowrank.py --results lowrank.jsonl
    # the tables from the rows that are there
    python benchmarks/lowrank.py --results lowrank.jsonl --table
    # time and memory of one 4096 × 11008 decomposition
    python benchmarks/lowrank.py --svd

Protocol: 128 calibration rows of full context, forward passes in float32, statistics of a block
from the compressed blocks before it, everything through the pipeline of `compress lowrank`, its
guard included; perplexity of the saved folder on held-out text. One JSON line a row goes to the
results file; rows that it holds already are not run again, so a run can be interrupted. The folders
of models and token rows are those of benchmarks/ratios.py: COMPRESS_SHARED names their parent.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from common import SHARED, TESTS, emit, read

import compressor
from compressor.calibration.tokens import evaluation_rows
from compressor.checkpoint.reader import Reader
from compressor.evaluation import perplexity

MODELS = ["babyllama105", "books-1m"]
KEEPS = ["80%", "70%", "60%", "50%"]
METHODS: dict[str, dict[str, Any]] = {
    "svd": {"method": "svd"},
    "welore": {"method": "welore"},
    "asvd": {"method": "asvd"},
    "svd_llm": {"method": "svd_llm"},
    "fisher": {"method": "fisher"},
    "svd_llm, threshold": {"method": "svd_llm", "ranks": "threshold"},
    "fisher, tune 4": {"method": "fisher", "tune": 4},
}
KEY = ("model", "method", "keep")
ROUTES = {  # to the factors of rank 1024
    "torch.linalg.svd, float32": "p, s, q = torch.linalg.svd(w, full_matrices=False)\n"
    "u, v = p[:, :1024] * s[:1024], q[:1024]",
    "torch.svd_lowrank (randomised), float32": "p, s, q = torch.svd_lowrank(w, 1024, niter=2)\n"
    "u, v = p * s, q.T",
    "eigh of the Gram matrix, float64": "found, _ = decompose(w, 1024)\n"
    "u, v = found.u.float(), found.v.float()",
}


def run(model: str, method: str, keep: str) -> dict[str, Any]:
    """One row: compress, load, score."""
    started = time.process_time()
    data = SHARED / "data" / "canary"
    with TemporaryDirectory() as folder:
        report = compressor.lowrank(
            SHARED / "models" / model, Path(folder) / "out", keep=keep,
            dataset=data / f"{model}-calib.jsonl",
            num_samples=128, dtype="float32", device="cpu", **METHODS[method],
        )  # fmt: skip
        found = score(Path(folder) / "out", model)
    chosen = report.allocation
    return {
        "ppl": found,
        "parameters": chosen["parameters"] / chosen["dense_parameters"],
        "rank_reduction": chosen["rank_reduction"],
        "taken": chosen.get("taken", chosen["by"]),
        "seconds": round(time.process_time() - started, 1),
    }


def score(folder: Path, model: str) -> float:
    text, config = (
        SHARED / "data" / "canary" / f"{model}-{TESTS[model]}.jsonl",
        Reader(folder).config,
    )
    rows = evaluation_rows(
        str(text), folder, config["vocab_size"], seq_len=config["max_position_embeddings"]
    )
    return perplexity(compressor.load(folder, dtype=torch.float32), rows)


def measure(results: Path, models: list[str], methods: list[str], keeps: list[str]) -> None:
    cases = [("dense", "100%"), *((method, keep) for method in methods for keep in keeps)]
    for method, keep in cases:
        for model in models:
            if (model, method, keep) in read(results, KEY):
                continue
            found = (
                {"ppl": score(SHARED / "models" / model, model)}
                if method == "dense"
                else run(model, method, keep)
            )
            row = dict(zip(KEY, (model, method, keep), strict=True)) | found
            emit(row, results)


def table(found: dict[tuple[str, ...], dict[str, Any]]) -> str:
    """Per model, a row a method: perplexity, and in brackets the rise of the loss in nats."""
    lines: list[str] = []
    for model in MODELS:
        dense = found.get((model, "dense", "100%"))
        if dense is None:
            continue
        lines += [
            f"**{model}**, dense {dense['ppl']:.3f}",
            "",
            f"| | {' | '.join(KEEPS)} |",
            "|---|" + "---:|" * len(KEEPS),
        ]
        for method in METHODS:
            cells = [_cell(found.get((model, method, keep)), dense["ppl"]) for keep in KEEPS]
            lines += [f"| {method} | {' | '.join(cells)} |"]
        lines += [""]
    return "\n".join(lines)


def _cell(row: dict[str, Any] | None, dense: float) -> str:
    if row is None:
        return "–"
    mark = " u" if row["taken"] == "uniform" and row["method"] == "fisher" else ""
    return f"{row['ppl']:.3f} ({math.log(row['ppl'] / dense):.3f}){mark}"


def decompositions() -> None:
    """Seconds, added memory and error of each route, each in a process of its own; columns are
    scaled as whitening does.
    """
    print("| route | time | memory | error |\n|---|---:|---:|---:|")
    for name, code in ROUTES.items():
        script = (
            "import resource, time, torch\nfrom compressor.methods.factor import decompose\n"
            "w = torch.randn(4096, 11008, generator=torch.Generator().manual_seed(0)) * "
            "torch.arange(1, 11009) ** -0.5\n"
            "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\nbefore, started = "
            "peak(), time.perf_counter()\n"
            f"{code}\nseconds, added = time.perf_counter() - started, peak() - before\n"
            "print(seconds, added * 1024, ((w - u @ v).double().norm() / w.double().norm()).item())"
        )
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=True
        )
        seconds, added, error = map(float, done.stdout.split())
        print(f"| {name} | {seconds:.0f} s | {added / 1e9:.2f} GB | {error:.6f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=Path("lowrank.jsonl"))
    parser.add_argument("--model", nargs="+", default=MODELS, choices=MODELS)
    parser.add_argument("--method", nargs="+", default=list(METHODS), choices=METHODS)
    parser.add_argument("--keep", nargs="+", default=KEEPS, choices=KEEPS)
    parser.add_argument("--table", action="store_true", help="print the tables, run nothing")
    parser.add_argument("--svd", action="store_true", help="measure a decomposition")
    arguments = parser.parse_args()
    if arguments.svd:
        decompositions()
        return
    if not arguments.table:
        measure(arguments.results, arguments.model, arguments.method, arguments.keep)
    print(table(read(arguments.results, KEY)))


if __name__ == "__main__":
    main()
