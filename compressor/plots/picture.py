"""A chart as a file, drawn by matplotlib from the same tree the page shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from compressor.checkpoint.atomic import naming
from compressor.errors import OutputError, UsageError
from compressor.plots.charts import Chart
from compressor.plots.colours import LIGHT
from compressor.plots.need_matplotlib import require_matplotlib


def check_picture(path: Path) -> None:
    """Raise UsageError where a picture cannot be made: the library is not there, or the name is not
    one of a picture.
    """
    require_matplotlib("--plot")
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UsageError(f"--plot {path} ends in {path.suffix!r}; accepted: .png, .svg, .pdf")


def write_picture(chart: Chart, path: Path) -> None:
    """The chart in light colours, its title on top. The same chart gives the same bytes.

    Raises:
        OutputError: the file cannot be written.
    """
    import matplotlib
    from matplotlib.figure import Figure

    metadata: dict[str, Any] = {"Title": chart.title}
    if path.suffix.lower() == ".png":
        metadata |= {"Description": chart.text, "Software": None}
    elif path.suffix.lower() == ".svg":
        metadata |= {"Description": chart.text, "Date": None}
    else:
        metadata |= {"Subject": chart.text, "CreationDate": None}
    with matplotlib.rc_context({"svg.hashsalt": "compress"}), naming(path):
        figure = Figure(facecolor=LIGHT["page"])
        _draw(figure, chart)
        figure.savefig(path, dpi=200, metadata=metadata)


def write_pictures(charts: list[Chart], folder: Path) -> None:
    """One PNG file for each chart in `folder`, which is made if need be.

    Raises:
        UsageError: matplotlib is not installed.
        OutputError: a file is there already, or cannot be written.
    """
    require_matplotlib("--png")
    paths = [folder / f"{chart.name}.png" for chart in charts]
    for path in paths:
        if path.exists():
            raise OutputError(
                f"{path} exists already; choose another folder with --png or remove it"
            )
    with naming(folder):
        folder.mkdir(parents=True, exist_ok=True)
    for chart, path in zip(charts, paths, strict=True):
        write_picture(chart, path)


def _draw(figure: Any, chart: Chart) -> None:
    """The elements of the tree, one CSS pixel as 1 / 96 inch, with a margin and room for the
    title.
    """
    margin, head = 16.0, 34.0
    width, height = float(chart.svg.get("width", 0)), float(chart.svg.get("height", 0))
    right, below = width + margin, height + margin
    figure.set_size_inches((right + margin) / 96, (below + head) / 96)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_xlim(-margin, right)
    axes.set_ylim(below, -head)
    axes.axis("off")
    axes.text(
        0, -14, _plain(chart.title), fontsize=_points(15), fontweight="bold", color=LIGHT["ink"]
    )
    for order, element in enumerate(chart.svg):
        _element(axes, element, order)


def _element(axes: Any, element: Element, order: int) -> None:
    """Draw one; the later in the tree, the further in front."""
    from matplotlib.patches import Rectangle

    def at(name: str) -> float:
        return float(element.get(name, 0))

    colour = LIGHT[element.get("class", "ink")]
    if element.tag == "rect":
        axes.add_patch(
            Rectangle(
                (at("x"), at("y")),
                at("width"),
                at("height"),
                color=colour,
                linewidth=0,
                zorder=order,
            )
        )
    elif element.tag == "line":
        axes.plot(
            [at("x1"), at("x2")], [at("y1"), at("y2")], color=colour, linewidth=0.75, zorder=order
        )
    elif element.tag == "polyline":
        places = [
            tuple(map(float, point.split(","))) for point in element.get("points", "").split()
        ]
        width = _points(at("stroke-width"))
        axes.plot(
            [x for x, _ in places],
            [y for _, y in places],
            color=colour,
            linewidth=width,
            zorder=order,
        )
    elif element.tag == "text":
        turn = -float(element.get("transform", "rotate(0 ").removeprefix("rotate(").split()[0])
        side = {"start": "left", "middle": "center", "end": "right"}[
            element.get("text-anchor", "start")
        ]
        style = {
            "ha": side,
            "va": "baseline",
            "rotation": turn,
            "rotation_mode": "anchor",
            "fontsize": _points(11),
        }
        axes.text(at("x"), at("y"), _plain(element.text or ""), color=colour, zorder=order, **style)


def _points(pixels: float) -> float:
    return pixels * 72 / 96


def _plain(text: str) -> str:
    """The text as it is: matplotlib takes what stands between dollars for a formula."""
    return text.replace("$", r"\$")
