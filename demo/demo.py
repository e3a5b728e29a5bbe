"""The demo: one small real model, three pruning methods, what each does to size and quality.

The model (demo/books-1m, 1.3 million parameters) was trained on public-domain books. Everything runs offline on two CPU
cores: calibration and test texts are both written by the model itself, with different seeds.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
MODEL = HERE / "books-1m"
OUT = HERE.parent / ".demo"
METHODS = {
    "magnitude": "drop the smallest weights",
    "wanda": "drop the weights that matter least to the inputs seen",
    "sparsegpt": "the same, and let the kept weights make up for it",
}


def compress(*arguments: object) -> str:
    """Run one `compress` command, shown as a user would type it; returns what it prints."""
    shown = [str(Path(part).relative_to(HERE.parent)) if isinstance(part, Path) else str(part) for part in arguments]
    print("$ compress " + " ".join(shown), flush=True)
    command = [sys.executable, "-m", "compressor", *map(str, arguments)]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def score(model: Path) -> dict[str, Any]:
    """Perplexity on text the dense model writes, and bytes, of one checkpoint."""
    result = json.loads(compress("eval", model, "--baseline", MODEL, "--dataset", "self", "--dtype", "float32", "--json", "-q"))
    return {
        "perplexity": result["results"]["self"]["token_perplexity,none"],
        "before": result["baseline"]["results"]["self"]["token_perplexity,none"],
        "bytes": result["config"]["model_bytes"],
    }


def main() -> None:
    """Prune, score and tabulate."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table

    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    started = time.time()
    table = Table(title="\nHalf of the weights removed (2:4), and the price in quality", title_justify="left", box=SIMPLE_HEAD)
    for heading in ("", "linears on disk", "perplexity", "how"):
        table.add_column(heading, justify="right" if heading in ("linears on disk", "perplexity") else "left")
    for number, (method, how) in enumerate(METHODS.items()):
        out = OUT / method
        compress("prune", MODEL, "-o", out, "--method", method, "--pattern", "2:4", "-q")
        totals = json.loads((out / "report.json").read_text())["totals"]
        found = score(out)
        if not number:
            table.add_row("the original", f"{totals['dense_bytes'] / 1e6:.2f} MB", f"{found['before']:.1f}", "")
        table.add_row(method, f"{totals['bytes'] / 1e6:.2f} MB", f"{found['perplexity']:.1f}", how)
    Console().print(table)
    print("perplexity: how surprised a model is by text (lower is better); here held-out text that the original model wrote.")
    print(f"The compressed models are in {OUT.relative_to(HERE.parent)}/; look at one with: compress inspect .demo/sparsegpt")
    print(f"{time.time() - started:.0f} s")


if __name__ == "__main__":
    main()
