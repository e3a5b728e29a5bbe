"""What every method and refinement costs in quality, bytes and time, on real models:
docs/quality.md.

    python benchmarks/quality.py                                  # what is not measured yet
    python benchmarks/quality.py --model smollm2 --quick          # a quarter of the text, marked so
    python benchmarks/quality.py --model books-1m --case 2:4-wanda 2:4-sparsegpt
    python benchmarks/quality.py --write                          # docs/quality.md, of all rows

A case is a command line of `compress`: the model is compressed and scored by it, in processes of
their own with one thread, and what it makes is removed. Each row is one line of JSON in
benchmarks/quality.jsonl as soon as it is known: it is not measured again, a run that was cut off
goes on. To measure it again, remove its line. The table is made of these lines alone.

Protocol: linears inside the decoder blocks, everything computed in float32. Canary models: 128
calibration rows of full context, all rows of their test text. SmolLM2-135M-Instruct: 64 x 1024
tokens of c4-sample.txt, the first 32 windows of 1024 tokens of WikiText-2's test text; `--quick`
takes 16 x 1024 and 8 windows. The KL divergence is that from the dense model on the same tokens.
COMPRESS_SHARED names the folder of models and texts; SmolLM2 is made by benchmarks/smollm2.py, or
given by --smollm2.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from common import SHARED, TESTS, emit, read
from quality_page import page
from smollm2 import UnavailableError, fetch

import compressor
from compressor.evaluation import DIVERGENCE, METRIC

ROWS = Path(__file__).with_suffix(".jsonl")
PAGE = Path(__file__).parents[1] / "docs" / "quality.md"
KEY = ("model", "protocol", "case")

ROUNDED = ("int4 nearest", "int4 GPTQ", "int3 nearest", "int3 GPTQ")
CASES = {
    "2:4-magnitude": "prune --method magnitude",
    "2:4-wanda": "prune --method wanda",
    "2:4-nowag": "prune --method nowag",
    "2:4-sparsegpt": "prune --method sparsegpt",
    "2:4-wanda-dsnot": "prune --method wanda --refine dsnot",
    "2:4-sparsegpt-lsq": "prune --method sparsegpt --refine lsq",
    "2:4-sparsegpt-swap": "prune --method sparsegpt --refine swap",
    "2:4-sparsegpt-match": "prune --method sparsegpt --match 0.5",
    "2:4-admm": "prune --method sparsegpt --refine admm",
    "2:4-admm-match": "prune --method sparsegpt --refine admm --match 0.5",
    "2:4-admm-auto": "prune --method sparsegpt --refine admm --match auto",
    "2:4-tune": "prune --method sparsegpt --tune 4",
    "2:4-admm-match-tune": "prune --method sparsegpt --refine admm --match 0.5 --tune 4",
    "2:4-admm-match-dense-10%": (
        "prune --method sparsegpt --refine admm --match 0.5 --dense-fraction 10%"
    ),
    "armor-6%": "prune --method armor --set overhead=0.0625 --set iterations=20 --set finish=3",
    "armor-6%-match": "prune --method armor --set overhead=0.0625 --match 0.5",
    "armor-12%": "prune --method armor",
    "armor-12%-match": "prune --method armor --match 0.5",
    "armor-12%-match-tune": "prune --method armor --match 0.5 --tune 4",
    "50%-wanda": "prune --pattern 50% --method wanda",
    "50%-sparsegpt": "prune --pattern 50% --method sparsegpt",
    "50%-admm-match": "prune --pattern 50% --method sparsegpt --refine admm --match 0.5",
    "lowrank-80%": "lowrank --method svd_llm --keep 80%",
    "lowrank-80%-match": "lowrank --method svd_llm --keep 80% --match 0.5",
    "lowrank-80%-fisher": "lowrank --method fisher --keep 80%",
    "lowrank-60%": "lowrank --method svd_llm --keep 60%",
    "lowrank-60%-match": "lowrank --method svd_llm --keep 60% --match 0.5",
    "lowrank-60%-fisher": "lowrank --method fisher --keep 60%",
}
"""What is measured beside the dense model and the rounded ones, and by which command."""


@dataclass(frozen=True)
class Protocol:
    """A model and the texts it is calibrated and scored on."""

    name: str
    folder: Path
    calibration: Path
    test: Path
    samples: int
    window: int
    limit: int | None
    label: str = "full"

    def compress(self, case: str, out: Path) -> list[str]:
        """The command line of a case."""
        command, *options = CASES[case].split()
        text = ["--dataset", self.calibration, "--num-samples", self.samples]
        shape = ["--seq-len", self.window, "--dtype", "float32", "--device", "cpu", "-q"]
        return list(map(str, [command, self.folder, "-o", out, *options, *text, *shape]))

    def score(self, *what: object) -> list[str]:
        """The command line of an evaluation."""
        rows = ["--limit", self.limit] if self.limit else []
        text = ["--dataset", self.test, "--seq-len", self.window, "--dtype", "float32"]
        return list(map(str, ["eval", *what, *text, *rows, "--device", "cpu", "--json", "-q"]))


def canary(name: str) -> Protocol:
    """One of the small models."""
    config = json.loads((SHARED / "models" / name / "config.json").read_text())
    rows = SHARED / "data" / "canary"
    return Protocol(
        name, SHARED / "models" / name, rows / f"{name}-calib.jsonl",
        rows / f"{name}-{TESTS[name]}.jsonl", 128, config["max_position_embeddings"], None,
    )  # fmt: skip


def smollm2(folder: Path, quick: bool) -> Protocol:
    """SmolLM2 in `folder`."""
    texts = SHARED / "data"
    return Protocol(
        "smollm2", folder, texts / "c4-sample.txt", texts / "wikitext2-test.txt",
        16 if quick else 64, 1024, 8 if quick else 32, "quick" if quick else "full",
    )  # fmt: skip


# --- measuring


def compress(arguments: Sequence[str]) -> tuple[str, float]:
    """Run `compress` with one thread; what it prints, and its CPU seconds. Raises RuntimeError."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "compressor", *arguments],
        capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or ["it ended"])[-1])
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.stdout, spent


def weights(folder: Path) -> int:
    """Numbers in the linears inside the decoder blocks."""
    linears = compressor.inspect(folder)["linears"]
    return sum(math.prod(each["shape"]) for each in linears if re.search(r"\.\d+\.", each["name"]))


def row(
    protocol: Protocol, case: str, scores: dict[str, Any], how: str, seconds: float | None
) -> dict[str, Any]:
    """One line of the results."""
    (values,) = scores["results"].values()
    size = scores["config"]["linear_bytes"]
    return {
        "model": protocol.name, "protocol": protocol.label, "case": case, "command": how,
        "ppl": round(values[METRIC], 4),
        "kl": round(values[DIVERGENCE], 5) if DIVERGENCE in values else 0.0,
        "linear_bytes": int(size), "bits": round(size * 8 / weights(protocol.folder), 3),
        "cpu_s": None if seconds is None else round(seconds, 1),
    }  # fmt: skip


def measure_originals(protocol: Protocol) -> Iterator[dict[str, Any]]:
    """The dense model, and what int4 and int3 make of it."""
    grids = ["--baseline", "int4", "--baseline", "int3"]
    text = ["--calibration", protocol.calibration, "--calibration-samples", protocol.samples]
    printed, _ = compress(protocol.score(protocol.folder, *grids, *text))
    found = json.loads(printed)
    yield row(protocol, "dense", found["baseline"], "", None)
    for name in ROUNDED:
        grid = name.split()[0]
        yield row(protocol, name, found["rounded"][name], f"eval --baseline {grid}", None)


def measure(protocol: Protocol, case: str, work: Path) -> dict[str, Any]:
    """One case: compress, score, remove."""
    out = work / f"{protocol.name}-{protocol.label}-{list(CASES).index(case)}"
    _, seconds = compress(protocol.compress(case, out))
    printed, _ = compress(protocol.score(out, "--baseline", protocol.folder))
    shutil.rmtree(out)
    for beside in work.glob(f"{out.name}.*"):
        beside.unlink()
    return row(protocol, case, json.loads(printed), CASES[case], seconds)


def run(protocol: Protocol, cases: Sequence[str], results: Path, work: Path) -> int:
    """Measure what `results` does not have; how many cases failed."""
    known, failed = read(results, KEY), 0
    if any((protocol.name, protocol.label, case) not in known for case in ("dense", *ROUNDED)):
        for found in measure_originals(protocol):
            if tuple(found[name] for name in KEY) not in known:
                emit(found, results)
    for case in cases:
        if (protocol.name, protocol.label, case) in known:
            continue
        try:
            emit(measure(protocol, case, work), results)
        except RuntimeError as error:
            failed += 1
            print(f"{protocol.name} {case}: {error}", file=sys.stderr)
    return failed


def protocols(names: Sequence[str], folder: Path | None, quick: bool) -> Iterator[Protocol]:
    """Those of `names` whose model is here; a line says which is not, and why."""
    for name in names:
        if name == "smollm2":
            try:
                yield smollm2(fetch(folder or SHARED / "models" / "smollm2"), quick)
            except (UnavailableError, OSError) as error:
                print(f"smollm2 is left out: {error}", file=sys.stderr)
        elif (SHARED / "models" / name).is_dir():
            yield canary(name)
        else:
            print(f"{name} is left out: {SHARED / 'models' / name} is not here", file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    models = [*TESTS, "smollm2"]
    parser.add_argument("--model", nargs="+", default=models, choices=models)
    parser.add_argument("--case", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--quick", action="store_true", help="a quarter of SmolLM2's text")
    parser.add_argument("--smollm2", type=Path, help="its folder")
    parser.add_argument("--results", type=Path, default=ROWS)
    parser.add_argument("--work", type=Path, help="where folders are made; kept, to be gone on in")
    parser.add_argument("--write", action="store_true", help=f"only write {PAGE.name}")
    args = parser.parse_args()
    if args.write:
        PAGE.write_text(page(list(read(args.results, KEY).values())))
        return 0
    failed = 0
    with TemporaryDirectory() as folder:
        work = args.work or Path(folder)
        work.mkdir(exist_ok=True)
        for protocol in protocols(args.model, args.smollm2, args.quick):
            failed += run(protocol, args.case, args.results, work)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
