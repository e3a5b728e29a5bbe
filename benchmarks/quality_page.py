"""docs/quality.md, made of the rows that benchmarks/quality.py measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Row = Mapping[str, Any]

_HEAD = """\
# Quality

Perplexity and KL divergence from the dense model, bits a weight of the linears, and CPU seconds of
the compression, for every method and refinement on the same models and texts. Made by
`python benchmarks/quality.py --write` from the rows in benchmarks/quality.jsonl, which
`python benchmarks/quality.py` measures; do not edit.

Only the linears inside the decoder blocks are compressed; *bits* are those of their weights as
stored, with all that belongs to them (2:4 takes 9 bits of 16, and 18 of 32). *Lost* is the rise of
the logarithm of the perplexity as a share of what plain SparseGPT 2:4 loses on the same model.
`int4` and `int3` are the dense model with these linears rounded, in groups of 64
([eval.md](eval.md#what-plain-int4-would-give)). Everything is computed in float32, with one thread.
Seconds were taken while other work ran on the machine: they order the methods, no more.
"""

_TITLES = {
    ("smollm2", "full"): (
        "SmolLM2-135M-Instruct",
        "Calibration 64 x 1024 tokens of C4, the first 32 windows of 1024 tokens of WikiText-2.",
    ),
    ("smollm2", "quick"): (
        "SmolLM2-135M-Instruct, a quarter of the text",
        "Calibration 16 x 1024 tokens of C4, the first 8 windows of 1024 tokens of WikiText-2: not "
        "the full protocol, whose numbers are lower for all that is calibrated.",
    ),
    ("babyllama105", "full"): (
        "babyllama105",
        "0.9 million parameters, characters, trained in float32. Calibration 128 x 256 tokens, "
        "scored on TinyStories.",
    ),
    ("books-1m", "full"): (
        "books-1m",
        "1.3 million parameters, the model of the demo, trained in bfloat16. Calibration 128 x 512 "
        "tokens, scored on books.",
    ),
    ("stories260K", "full"): (
        "stories260K",
        "0.26 million parameters, trained in float32. Calibration 128 x 512 tokens, scored on "
        "TinyStories; another draw of the calibration moves a number by up to 5 %.",
    ),
}
_FLATTERED = (
    "This model was made from 4-bit weights in groups of 32 (Q4_1): rounding it to int4 nearly "
    "finds them again, so **the int4 rows flatter int4 here**; the models below were trained in "
    "full precision."
)


def page(rows: Sequence[Row]) -> str:
    """The whole page."""
    parts = [_HEAD]
    for key, (title, text) in _TITLES.items():
        chosen = [row for row in rows if (row["model"], row["protocol"]) == key]
        if chosen:
            note = [_FLATTERED] if key[0] == "smollm2" else []
            parts.append("\n\n".join([f"## {title}", _wrapped(text), *map(_wrapped, note)]) + "\n")
            parts.append(_table(chosen))
    return "\n".join(parts)


def _table(rows: Sequence[Row]) -> str:
    by_case = {row["case"]: row for row in rows}
    dense, plain = by_case["dense"]["ppl"], by_case.get("2:4-sparsegpt", {}).get("ppl")
    lines = [
        "| case | perplexity ↓ | lost ↓ | KL ↓ | bits a weight | CPU s | `compress …` |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for row in rows:
        rise = math.log(row["ppl"] / dense)
        lost = f"{rise / math.log(plain / dense):.2f}" if plain else "–"
        seconds = "–" if row["cpu_s"] is None else f"{row['cpu_s']:.0f}"
        command = f"`{row['command']}`" if row["command"] else ""
        cells = [row["case"], f"{row['ppl']:.4g}", lost, f"{row['kl']:.4g}", f"{row['bits']:.2f}"]
        lines.append("| " + " | ".join([*cells, seconds, command]) + " |")
    return "\n".join([*lines, "", _where(rows), ""])


def _where(rows: Sequence[Row]) -> str:
    """What the rows were measured on."""
    places = {f"{row['machine']}, torch {row['torch']}" for row in rows}
    return _wrapped(f"Measured on {'; '.join(sorted(places))}.")


def _wrapped(text: str) -> str:
    import textwrap

    return textwrap.fill(text, 100, break_long_words=False, break_on_hyphens=False)
