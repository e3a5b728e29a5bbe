"""A plan as a map of blocks by linears: what goes of each, for the table and as a heat map."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import TYPE_CHECKING, TypeVar

from compressor.plots import charts
from compressor.plots.charts import Chart
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


def heat_map(plan: Plan, title: str, what: str) -> Chart:
    """The plan as a chart: `what` goes of each linear, in per cent; of experts the mean."""
    columns, rows = sparsities(plan)
    values = {
        (block, column): 100 * fmean(each)
        for block, row in enumerate(rows)
        for column, each in zip(columns, row, strict=True)
        if each
    }
    mean = "; of experts the mean" if any("*" in name for name in columns) else ""
    return charts.heat_map(
        "plan",
        f"{title}: {what}, %{mean}",
        range(len(rows)),
        values,
        lambda value: f"{value:.1f} %",
        "no such linear",
    )
