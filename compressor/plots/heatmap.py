"""A picture of a plan: blocks by linears, what goes of each as a colour and a number."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, TypeVar

from compressor.errors import OutputError, UsageError
from compressor.plots.need_matplotlib import require_matplotlib
from compressor.text import part

if TYPE_CHECKING:
    from compressor.engine.plan import Plan
from compressor.engine.task import Task

T = TypeVar("T")


def cells(
    plan: Plan, value: Callable[[Task], T], dense: T
) -> tuple[list[str], list[list[list[T]]]]:
    """Names of the linears inside a block, those of its experts as one, and per block the values of
    each.

    `dense` is the value of one left dense; there is no value of a linear that a block has not, and
    one of every expert.
    """
    known = {task.linear.name: value(task) for task in plan.every}
    blocks: list[dict[str, list[T]]] = []
    for index in range(len(plan.skeleton.blocks)):
        prefix = f"{plan.skeleton.path}.{index}."
        blocks.append({})
        for linear in plan.skeleton.linears(index):
            blocks[-1].setdefault(part(linear.name.removeprefix(prefix)), []).append(
                known.get(linear.name, dense)
            )
    columns = list(dict.fromkeys(name for block in blocks for name in block))
    return columns, [[block.get(name, []) for name in columns] for block in blocks]


def headings(columns: Sequence[str]) -> list[str]:
    """The last word of each name; where that says too little the module it is in, a line above:
    `experts`, `up_proj`.
    """
    words = [[word for word in name.split(".") if word != "*"] for name in columns]
    last = Counter(each[-1] for each in words)
    return [
        "\n".join(each[-2:]) if "*" in name or last[each[-1]] > 1 else each[-1]
        for name, each in zip(columns, words, strict=True)
    ]


def sparsities(plan: Plan) -> tuple[list[str], list[list[list[float]]]]:
    """As `cells`: the fractions of the numbers that go, zeros of a pattern or what factors do
    without.
    """
    return cells(plan, lambda task: task.removed, 0.0)


def check_drawing(path: Path) -> None:
    """Raise UsageError where a picture cannot be made: the library is not there, or the name is not
    one of a picture.
    """
    require_matplotlib("--plot")
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UsageError(f"--plot {path} ends in {path.suffix!r}; accepted: .png, .svg, .pdf")


def draw(plan: Plan, path: Path, title: str, what: str) -> None:
    """Draw the plan of `plan`, `what` goes of each linear (of experts the mean), into the file
    `path`. Raises OutputError.
    """
    from matplotlib.figure import Figure

    columns, rows = sparsities(plan)
    figure = Figure(
        figsize=(1.6 + 0.9 * len(columns), 1.8 + 0.34 * len(rows)), layout="constrained"
    )
    axes = figure.add_subplot()
    values = [[100 * fmean(each) if each else float("nan") for each in row] for row in rows]
    image = axes.imshow(values, vmin=0, vmax=100, cmap="viridis", aspect="auto")
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if value == value:
                axes.text(
                    x,
                    y,
                    f"{value:.0f}",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if value < 60 else "black",
                )
    axes.set_xticks(range(len(columns)), headings(columns), rotation=35, ha="right")
    axes.set_yticks(range(len(rows)))
    axes.set_ylabel("block")
    axes.set_title(title, fontsize=10)
    mean = "; of experts the mean" if any("*" in name for name in columns) else ""
    figure.colorbar(image, label=f"{what}, %{mean}")
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from None
