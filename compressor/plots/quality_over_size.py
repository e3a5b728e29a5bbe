"""Quality over size: one panel per number, one point per model, as PNG or SVG. Needs matplotlib,
which is imported here only.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from compressor.checkpoint.atomic import naming
from compressor.errors import OutputError, UsageError
from compressor.plots.need_matplotlib import require_matplotlib
from compressor.records.scores import arrow, label, metrics

_SUFFIXES = (".png", ".svg")
_MOST = 9  # panels
_COLOURS = [
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#000000",
]  # told apart by the colour-blind too
_MARKERS = "ovDP^X*<>h"


def check_plot(path: Path) -> None:
    """Everything about a plot that can be known before work starts. Raises UsageError,
    OutputError.
    """
    if path.suffix not in _SUFFIXES:
        raise UsageError(f"--plot {path} ends in {path.suffix or 'nothing'}; accepted: .png, .svg")
    if path.exists():
        raise OutputError(f"output {path} exists already; choose another with --plot or remove it")
    if not path.resolve().parent.is_dir():
        raise OutputError(
            f"output {path} cannot be written: {path.resolve().parent} is not a folder"
        )
    require_matplotlib("--plot")


def draw(
    scored: Mapping[str, Mapping[str, Any]], path: Path, *, baseline: str | None = None
) -> None:
    """Write the picture. The same scores give the same bytes.

    Args:
        scored: name -> what `evaluate` returned.
        path: ends in .png or .svg.
        baseline: the name among them that gets a line across.
    """
    import matplotlib
    from matplotlib.figure import Figure

    wanted = list(
        dict.fromkeys(
            (task, metric) for result in scored.values() for task, metric, _ in metrics(result)
        )
    )[:_MOST]
    columns = min(3, max(1, len(wanted)))
    lines = -(-len(wanted) // columns)
    style: Any = {
        "svg.hashsalt": "compress",
        "font.size": 9,
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with matplotlib.rc_context(style):
        figure = Figure(
            figsize=(4.2 * columns + 0.4, 3.2 * lines + 0.6),
            layout="constrained",
            facecolor="white",
        )
        axes = figure.subplots(lines, columns, squeeze=False, sharex=True).flatten()
        for axis, (task, metric) in zip(axes, wanted, strict=False):
            _panel(axis, scored, task, metric, baseline)
        for axis in axes[len(wanted) :]:
            axis.set_visible(False)
        handles = {str(handle.get_label()): handle for axis in axes for handle in axis.get_lines()}
        names = [name for name in _short(scored).values() if name in handles]
        figure.legend(
            [handles[name] for name in names],
            names,
            loc="outside lower center",
            ncols=min(4, len(names)),
            frameon=False,
        )
        metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
        with naming(path):
            figure.savefig(path, dpi=160, metadata=metadata)


def _short(scored: Mapping[str, Any]) -> dict[str, str]:
    """Names for people: the folder's, or all of it where two have the same."""
    short = {name: Path(name).name for name in scored}
    return short if len(set(short.values())) == len(short) else {name: name for name in scored}


def _panel(
    axis: Any, scored: Mapping[str, Mapping[str, Any]], task: str, metric: str, baseline: str | None
) -> None:
    unit, divisor = (
        ("GB", 1e9)
        if max(result["config"]["model_bytes"] for result in scored.values()) >= 1e9
        else ("MB", 1e6)
    )
    names, values = _short(scored), []
    for index, (name, result) in enumerate(scored.items()):
        value = result["results"].get(task, {}).get(metric)
        if not isinstance(value, float):
            continue
        values.append(value)
        colour, marker = (
            ("#555555", "s")
            if name == baseline
            else (_COLOURS[index % len(_COLOURS)], _MARKERS[index % len(_MARKERS)])
        )
        if name == baseline:
            axis.axhline(value, color=colour, linewidth=0.8, linestyle=":")
        size = result["config"]["model_bytes"] / divisor
        axis.plot(
            [size],
            [value],
            color=colour,
            marker=marker,
            linestyle="none",
            markersize=7,
            label=names[name],
        )
    if min(values) > 0 and max(values) > 8 * min(values):
        axis.set_yscale("log")
    axis.margins(x=0.2, y=0.15)
    axis.set_xlabel(f"checkpoint, {unit}")
    knows = next(result for result in scored.values() if task in result["results"])
    better = "higher" if arrow(knows, task, metric) == "↑" else "lower"
    axis.set_title(f"{task}: {label(metric)} ({better} is better)", fontsize=9, loc="left")
    axis.grid(alpha=0.25, linewidth=0.6)
