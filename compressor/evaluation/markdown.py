"""Scores of several models as a markdown table: one column per model, one row per number, sizes
first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from compressor.evaluation.windows import METRIC
from compressor.records.scores import arrow, label, metrics


def table(scored: Mapping[str, Mapping[str, Any]]) -> str:
    """The table. Args: scored: heading of the column -> what `evaluate` returned."""
    short = [Path(name).name for name in scored]
    rows = [["", *(short if len(set(short)) == len(short) else scored)], []]
    rows += [row for row in _rows(list(scored.values())) if set(row[1:]) != {"-"}]
    widths = [max(len(row[column]) for row in rows if row) for column in range(len(rows[0]))]

    def line(row: list[str]) -> str:
        cells = [
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "| " + " | ".join(cells) + " |"

    rows[1] = ["-" * widths[0], *["-" * (width - 1) + ":" for width in widths[1:]]]
    return "\n".join(map(line, rows))


def _rows(results: list[Mapping[str, Any]]) -> Iterator[list[str]]:
    def cells(value: Any) -> list[str]:
        return ["-" if cell is None else f"{cell:.4g}" for cell in map(value, results)]

    for heading, key in (("checkpoint (MB)", "model_bytes"), ("linears (MB)", "linear_bytes")):
        sizes = [result["config"].get(key) for result in results]
        yield [heading, *["-" if size is None else f"{size / 1e6:.2f}" for size in sizes]]
    for heading, key in (
        ("prompt tokens/s ↑", "prefill_tokens_per_second"),
        ("written tokens/s ↑", "decode_tokens_per_second"),
    ):
        yield [heading, *cells(lambda result, key=key: result.get("speed", {}).get(key))]
    for task, metric in dict.fromkeys(
        (task, metric) for result in results for task, metric, _ in metrics(result)
    ):
        knows = next(result for result in results if task in result["results"])
        heading = f"{task} {label(metric)} {arrow(knows, task, metric)}"
        yield [
            heading,
            *cells(lambda result, at=(task, metric): result["results"].get(at[0], {}).get(at[1])),
        ]
    served = [result.get("served", {}).get("results", {}) for result in results]
    for task in dict.fromkeys(task for result in served for task in result):
        values = [result.get(task, {}).get(METRIC) for result in served]
        heading = f"{task} token perplexity of the server ↓"
        yield [heading, *["-" if value is None else f"{value:.4g}" for value in values]]
