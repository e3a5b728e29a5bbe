"""A picture of a plan: blocks by linears, what goes of each as a colour and a number."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from compressor.drawing import require_matplotlib
from compressor.errors import OutputError, UsageError

if TYPE_CHECKING:
    from compressor.job import Job, Task

T = TypeVar("T")


def cells(job: Job, value: Callable[[Task], T], dense: T) -> tuple[list[str], list[list[T | None]]]:
    """Names of the linears inside a block, and per block a value of each: `dense` for one left dense, None for one it has not."""
    known = {task.linear.name: value(task) for task in job.every}
    blocks = []
    for index in range(len(job.skeleton.blocks)):
        prefix = f"{job.skeleton.path}.{index}."
        names = [linear.name for linear in job.skeleton.linears(index)]
        blocks.append({name.removeprefix(prefix): known.get(name, dense) for name in names})
    columns = list(dict.fromkeys(name for block in blocks for name in block))
    return columns, [[block.get(name) for name in columns] for block in blocks]


def sparsities(job: Job) -> tuple[list[str], list[list[float | None]]]:
    """As `cells`: the fraction of the numbers that goes, zeros of a pattern or what factors do without."""
    return cells(job, lambda task: task.removed, 0.0)


def check_drawing(path: Path) -> None:
    """Raise UsageError where a picture cannot be made: the library is not there, or the name is not one of a picture."""
    require_matplotlib("--plot")
    if path.suffix.lower() not in (".png", ".svg", ".pdf"):
        raise UsageError(f"--plot {path} ends in {path.suffix!r}; accepted: .png, .svg, .pdf")


def draw(job: Job, path: Path, title: str, what: str) -> None:
    """Draw the plan of `job`, `what` goes of each linear, into the file `path`. Raises OutputError."""
    from matplotlib.figure import Figure

    columns, rows = sparsities(job)
    figure = Figure(figsize=(1.6 + 0.9 * len(columns), 1.8 + 0.34 * len(rows)), layout="constrained")
    axes = figure.add_subplot()
    values = [[float("nan") if value is None else 100 * value for value in row] for row in rows]
    image = axes.imshow(values, vmin=0, vmax=100, cmap="viridis", aspect="auto")
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if value == value:
                axes.text(x, y, f"{value:.0f}", ha="center", va="center", fontsize=8, color="white" if value < 60 else "black")
    axes.set_xticks(range(len(columns)), [name.rpartition(".")[2] for name in columns], rotation=35, ha="right")
    axes.set_yticks(range(len(rows)))
    axes.set_ylabel("block")
    axes.set_title(title, fontsize=10)
    figure.colorbar(image, label=f"{what}, %")
    try:
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise OutputError(f"{path} cannot be written: {error.strerror or error}") from None
