"""One self-contained HTML page about a run: no scripts, nothing fetched, light and dark, narrow and
wide.

records/read_report.py has what the page says, checked, and plots/ its charts, as SVG trees. Every
string passes through jinja2's escaping (the template is page.html) or the XML writer's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any
from xml.etree import ElementTree

from compressor import text
from compressor.methods import command
from compressor.plots import charts
from compressor.plots.charts import Chart
from compressor.plots.spectra import spectra
from compressor.records.read_report import Record, Row, read_record

__all__ = ["draw", "read_record", "render"]

MOST_LINES = 2000  # of a table; report.json has them all


def render(record: Record) -> str:
    """The page."""
    import jinja2
    from markupsafe import Markup

    from compressor.plots.colours import DARK, LIGHT

    here = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=here,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters.update(size=text.size, number=text.number, duration=text.duration)
    drawn = [
        (
            chart,
            Markup(ElementTree.tostring(chart.svg, encoding="unicode")),
        )  # escaped by the XML writer
        for chart in draw(record)
    ]
    return environment.get_template("page.html").render(
        record=record,
        charts=drawn,
        same=_same(record),
        forms=_forms(record.rows),
        figures=_figures(record),
        goal=_goal(record.recipe),
        command=command(str(record.recipe.get("method"))),
        tokens=_calibration(record),
        errors=any(row.error is not None for row in record.rows),
        most=MOST_LINES,
        light=LIGHT,
        dark=DARK,
    )


def draw(record: Record) -> list[Chart]:
    """The charts that say something about this run: a map of one colour is left to a sentence."""
    rest = max(0, record.input_bytes - record.dense_bytes)
    drawn = [
        charts.stacked(
            "sizes",
            "Size of the checkpoint",
            {"before": [record.dense_bytes, rest], "after": [record.bytes, rest]},
            ["compressed linears", "everything else: embeddings, norms, what was left dense"],
            text.size,
        )
    ]
    if record.block_errors:
        drawn.append(
            charts.columns(
                "block-error",
                "Error by block",
                "relative squared error",
                record.block_errors,
                text.number,
            )
        )
    blocks = sorted(
        {row.block for row in record.rows if row.block is not None} | record.block_errors.keys()
    )
    for name, (title, values, show, missing) in _maps(record).items():
        if values and min(values.values()) < max(values.values()):
            drawn.append(charts.heat_map(name, title, blocks, values, show, missing))
    if chart := spectra("spectra", "Singular values by linear", record.spectra):
        drawn.append(chart)
    if seconds := record.run.get("block_seconds"):
        drawn.append(
            charts.columns(
                "block-seconds", "Time by block", "seconds", dict(enumerate(seconds)), text.number
            )
        )
    return drawn


def _maps(record: Record) -> dict[str, tuple[str, Mapping[tuple[int, str], float], Any, str]]:
    """Name -> title, cells, how to show a value, and what a cell without one is."""

    def cells(value: Any) -> dict[tuple[int, str], float]:
        return _cells(record.rows, value)

    share = cells(lambda row: row.bytes / row.dense_bytes if row.dense_bytes else None)
    zeros = cells(lambda row: row.sparsity)
    return {
        "error": ("Error by linear", cells(lambda row: row.error), text.number, "left dense"),
        "loss": (
            "Loss left by linear, of that at the start",
            cells(lambda row: row.loss),
            _percent,
            "not said by its method",
        ),
        "sparsity": ("Zeros by linear", zeros, _percent, "left dense, or of low rank"),
        "rank": ("Rank by linear", cells(lambda row: row.rank), text.number, "not of low rank"),
        "bytes": ("Bytes by linear, of dense", share, _share, "left dense"),
    }


def _cells(rows: list[Row], value: Any) -> dict[tuple[int, str], float]:
    """Block and part -> value, the mean over experts; without linears outside the blocks and those
    that have no value.
    """
    found: dict[tuple[int, str], list[float]] = {}
    for row in rows:
        if row.block is not None and (own := value(row)) is not None:
            found.setdefault((row.block, row.part), []).append(float(own))
    return {key: fmean(values) for key, values in found.items()}


def _same(record: Record) -> list[str]:
    """A sentence for every map that would have one colour."""
    places = {(row.block, row.part) for row in record.rows if row.block is not None}

    def where(values: Mapping[Any, Any], missing: str) -> str:
        return " everywhere" if len(values) == len(places) else f", or {missing}"

    return [
        f"{title}: {show(next(iter(values.values())))}{where(values, missing)}."
        for title, values, show, missing in _maps(record).values()
        if values and min(values.values()) == max(values.values())
    ]


def _forms(rows: list[Row]) -> list[tuple[str, int, int, int]]:
    """(format, linears, dense bytes, bytes) of every format there is."""
    found: dict[str, tuple[int, int, int]] = {}
    for row in rows:
        count, dense, stored = found.get(row.format, (0, 0, 0))
        found[row.format] = (count + 1, dense + row.dense_bytes, stored + row.bytes)
    return [(name, *sums) for name, sums in sorted(found.items())]


def _figures(record: Record) -> list[tuple[str, str, str]]:
    """(what, number, remark): what one looks for first."""
    found = [
        ("checkpoint", text.size(record.output_bytes), f"was {text.size(record.input_bytes)}"),
        (
            "compressed linears",
            _share(record.bytes / record.dense_bytes) if record.dense_bytes else "–",
            f"of their dense bytes: {text.size(record.bytes)} of {text.size(record.dense_bytes)}",
        ),
    ]
    if record.kept is not None:
        found.append(
            ("parameters kept", f"{record.kept:.2%}", "of those of all linears in the blocks")
        )
    pruned = [
        (row.sparsity, math.prod(row.shape[:2])) for row in record.rows if row.sparsity is not None
    ]
    if weights := sum(size for _, size in pruned):
        zeros = sum(sparsity * size for sparsity, size in pruned) / weights
        which = (
            "these linears"
            if len(pruned) == len(record.rows)
            else f"the {len(pruned)} linears that are not of low rank"
        )
        found.append(("zeros", _percent(zeros), f"of the weights of {which}"))
    for score in record.scores[:2]:
        name = score.metric.split(",")[0].replace("_", " ")
        before = "" if score.before is None else f", was {text.number(score.before)}"
        found.append((f"{name} {score.better}", text.number(score.value), f"{score.task}{before}"))
    if record.run:
        found.append(("time", text.duration(record.run["seconds"]), f"on {record.run['device']}"))
        for kind, peak in record.run["peak_memory"].items():
            found.append(("peak memory", text.size(peak), kind.removesuffix("_bytes")))
    return found


def _goal(recipe: Mapping[str, Any]) -> str:
    if recipe.get("keep"):
        return f"keep {recipe['keep']} of the linears' parameters"
    return "as planned" if recipe.get("plan") else f"pattern {recipe.get('pattern', '–')}"


def _calibration(record: Record) -> str:
    if not record.calibration_tokens:
        return "no calibration"
    source = record.recipe.get("dataset")
    return f"{record.calibration_tokens:,} calibration tokens, " + (
        "written by the model" if source == "self" else f"of {source}"
    )


def _share(share: float) -> str:
    return f"{share:.4f}"


def _percent(share: float) -> str:
    return f"{share:.1%}"
