"""The demo: one small real model, five ways to prune it, and what each does to size and quality.

The model (demo/books-1m, 1.3 million parameters) was trained on public-domain books. Everything
runs offline on two CPU cores: calibration and test texts are both written by the model itself, with
different seeds.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).parent
MODEL = HERE / "books-1m"
OUT = HERE.parent / ".demo"
RUNS = {
    "magnitude": (["--method", "magnitude"], "drop the smallest weights"),
    "wanda": (["--method", "wanda"], "drop those that matter least to the inputs"),
    "sparsegpt": (["--method", "sparsegpt"], "let the kept weights make up for it"),
    "admm": (
        ["--method", "sparsegpt", "--refine", "admm"],
        "choose again which to keep, all at once",
    ),
    "armor": (
        ["--method", "armor", "--set", "iterations=20", "--set", "finish=3"],
        "2:4 between two small dense factors",
    ),
}


def compress(*arguments: object) -> str:
    """Run one `compress` command, shown as a user would type it; returns what it prints."""
    shown = [
        str(Path(part).relative_to(HERE.parent)) if isinstance(part, Path) else str(part)
        for part in arguments
    ]
    print("$ compress " + " ".join(shown), flush=True)
    command = [sys.executable, "-m", "compressor", *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def decoding(folder: Path) -> str:
    """One line: how fast the packed model writes beside its dense twin, measured here."""
    from compressor_kernels.cpu.build import kernels

    if problem := kernels().problem:
        return f"decoding: as fast as dense, as packed linears are unpacked here: {problem}"
    options = ("--shape", "256x256", "--rows", 1, "--seconds", 1, "--batches", 1, "--json", "-q")
    dense, packed = json.loads(compress("bench", folder, *options))["decode"]
    return (
        f"decoding: {packed['tokens_per_s'] / dense['tokens_per_s']:.1f}x of dense "
        f"({packed['tokens_per_s']:.0f} tokens/s; larger models gain more: docs/kernels.md)"
    )


def linear_bytes(folder: Path) -> int:
    """Bytes of the linears inside the decoder blocks."""
    found = json.loads(compress("inspect", folder, "--json"))
    return sum(row["bytes"] for row in found["linears"] if ".layers." in row["name"])


def main() -> None:
    """Prune, score and tabulate."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    started = time.time()
    for name, (options, _) in RUNS.items():
        compress("prune", MODEL, "-o", OUT / name, *options, "--pattern", "2:4", "-q")
    outputs = [OUT / name for name in RUNS]
    scored = json.loads(
        compress(
            "eval",
            *outputs,
            "--baseline",
            MODEL,
            "--dataset",
            "self",
            "--dtype",
            "float32",
            "--json",
            "-q",
        )
    )
    rows = [("the original", MODEL, scored["baseline"], "")]
    rows += [(out.name, out, scored["models"][str(out)], RUNS[out.name][1]) for out in outputs]
    table = Table(
        title="\nHalf of the weights removed (2:4), and the price in quality",
        title_justify="left",
        box=SIMPLE_HEAD,
    )
    for heading in ("", "linears on disk", "perplexity", "how"):
        table.add_column(
            heading, justify="right" if heading in ("linears on disk", "perplexity") else "left"
        )
    for name, folder, result, how in rows:
        perplexity = result["results"]["self"]["token_perplexity,none"]
        table.add_row(name, f"{linear_bytes(folder) / 1e6:.2f} MB", f"{perplexity:.1f}", how)
    Console().print(table)
    print(
        "perplexity: how surprised a model is by text (lower is better); here held-out text that "
        "the original model wrote."
    )
    print(decoding(OUT / "sparsegpt"))
    print(
        f"The compressed models are in {OUT.relative_to(HERE.parent)}/; look at one with: compress "
        f"inspect .demo/sparsegpt"
    )
    print(f"{time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
