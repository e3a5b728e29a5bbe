"""What the benchmarks share: where the canary models and texts are, rows of results, and what they
ran on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from compressor.bench.cpu_timing import processor

SHARED = Path(os.environ.get("COMPRESS_SHARED", Path(__file__).parents[2] / "shared"))
TESTS = {
    "babyllama105": "tinystories-test",
    "stories260K": "tinystories-test",
    "books-1m": "books-test",
}
"""The text that each canary model is scored on, a file of SHARED / "data"."""


def environment() -> dict[str, Any]:
    """What a row of results ran on: torch, threads, and the GPU or the processor by name."""
    return {
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": hardware(),
    }


def hardware() -> str:
    """Name of the GPU, or of the processor."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return processor()


def emit(row: dict[str, Any], results: Path | None = None) -> None:
    """Print a row as JSON, with what it ran on, and add it to the file of results."""
    line = json.dumps(row | environment())
    if results is not None:
        with results.open("a") as file:
            file.write(line + "\n")
    print(line, flush=True)


def read(path: Path, key: Sequence[str]) -> dict[tuple[str, ...], dict[str, Any]]:
    """The rows of a file of results, by the values of `key`; none where there is no file."""
    lines = path.read_text().splitlines() if path.exists() else []
    return {tuple(row[name] for name in key): row for row in map(json.loads, lines)}
