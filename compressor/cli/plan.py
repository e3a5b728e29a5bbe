"""`compress plan`: what every linear would become, as a file to read, edit and compress with."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from compressor.cli import options
from compressor.cli.compress import show_allocation
from compressor.cli.show import begin, out, pruning_progress, table, tell

if TYPE_CHECKING:
    from compressor.allocation.choice import Choice
    from compressor.config.recipe import Recipe
    from compressor.engine.plan import Plan


@options.takes_settings("plan")
def plan(
    model: options.Model,
    output: Annotated[
        Path,
        typer.Option("--output", "-o", help="File to make; must not exist.", show_default=False),
    ],
    *,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw it too: a .png, .svg or .pdf file.", show_default=False),
    ] = None,
    max_sparsity: options.MaxSparsity = None,
    recipe: options.RecipeName = None,
    assign: options.Assign = None,
    device: options.Device = "auto",
    max_memory: options.MaxMemory = "",
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what was measured as JSON.")
    ] = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    **given: Any,
) -> None:
    """Choose what every linear becomes and write it to a file; the checkpoint is only read.

    [bold]Examples[/bold]

    compress plan org/model -o plan.toml --pattern 60% --ratios curve --dataset t.jsonl --plot p.png

    compress prune org/model -o out --plan plan.toml --method sparsegpt --dataset text.jsonl

    compress plan org/model -o plan.toml --keep 70% --dataset text.jsonl

    compress lowrank org/model -o out --plan plan.toml --dataset text.jsonl
    """
    from compressor.config.read import ask

    merged = ask("plan", model, recipe, given, options.assignments(assign, max_sparsity))
    from compressor.run.plan_file import PlanFile, check_new_file

    for path in (output, plot):
        if path:
            check_new_file(path)
    begin(quiet, verbose)
    from compressor.plots import picture, plan_map
    from compressor.run.pipeline import make_plan

    if plot:
        picture.check_picture(plot)
    with pruning_progress(quiet) as progress:
        choice = make_plan(merged, device=device, max_memory=max_memory, progress=progress)
    tell(choice.plan.notes)
    PlanFile.of(choice).save(output)
    if plot:
        title = f"{Path(merged.model).name}: {_chosen(merged)}"
        drawn = plan_map.heat_map(choice.plan, title, _what_goes(choice.plan))
        picture.write_picture(drawn, plot)
    if as_json:
        print(json.dumps(choice.measured, indent=1))
        return
    if not quiet:
        _show(choice)
    print(output)


def _chosen(recipe: Recipe) -> str:
    if recipe.keep:
        return f"keep {recipe.keep}, {recipe.method}"
    if recipe.plan:
        return "as planned"
    how = recipe.ratios or (
        f"{recipe.dense_fraction} dense" if recipe.dense_fraction else "one goal"
    )
    return f"{recipe.pattern}, {how}"


def _what_goes(plan: Plan) -> str:
    """What is counted: zeros, or where factors do without parameters as well these."""
    return (
        "parameters removed"
        if any(isinstance(task.target, int) for task in plan.every)
        else "zeros"
    )


def _show(choice: Choice) -> None:
    from compressor.engine.plan import ShareRanks
    from compressor.plots.plan_map import cells, sparsities

    plan = choice.plan
    if isinstance(plan.choice, ShareRanks):
        columns, ranks = cells(
            plan, lambda task: task.target if isinstance(task.target, int) else math.inf, math.inf
        )
        _print(
            "Rank of every linear", columns, [[_span(each, _rank) for each in row] for row in ranks]
        )
    else:
        columns, values = sparsities(plan)
        _print(
            f"{_what_goes(plan).capitalize()} of every linear, %",
            columns,
            [[_span(each, _coloured) for each in row] for row in values],
        )
        size = sum(
            linear.size for index in range(len(values)) for linear in plan.skeleton.linears(index)
        )
        gone = sum(task.removed * task.linear.size for task in plan.every)
        out.print(f"{_what_goes(plan)}: {round(gone)} of {size}, {gone / size:.2%}")
    show_allocation(choice.measured)


def _print(title: str, columns: list[str], blocks: list[list[Text]]) -> None:
    """A row for each block, a column for each linear, in as many tables as the width takes."""
    from compressor.plots.plan_map import headings

    heads = headings(columns)
    widths = [
        max(*map(len, head.splitlines()), *(len(row[place]) for row in blocks)) + 2
        for place, head in enumerate(heads)
    ]
    shown: list[list[int]] = [[]]
    for place in range(len(columns)):
        if (
            shown[-1]
            and len("block  ") + sum(widths[other] for other in (*shown[-1], place)) > out.width
        ):
            shown.append([])
        shown[-1].append(place)
    note = "; of experts the lowest and the highest" if any("*" in name for name in columns) else ""
    for number, places in enumerate(shown):
        found = table("" if number else title + note, "block")
        for place in places:
            found.add_column(heads[place], justify="right", no_wrap=True)
        for index, row in enumerate(blocks):
            found.add_row(str(index), *(row[place] for place in places))
        out.print(found)


def _span(values: list[float], show: Callable[[float], Text]) -> Text:
    """The lowest and the highest value, one where they are the same, nothing where there is
    none.
    """
    if not values:
        return Text()
    low, high = show(min(values)), show(max(values))
    return low if low.plain == high.plain else Text.assemble(low, "–", high)


def _rank(rank: float) -> Text:
    """A linear that stays dense is of more than every rank."""
    return Text("dense" if rank == math.inf else str(rank))


def _coloured(value: float) -> Text:
    """Green for what stays, through yellow, to red for what goes."""
    hue = (
        "green"
        if value < 0.4
        else "yellow"
        if value < 0.6
        else "dark_orange"
        if value < 0.75
        else "red"
    )
    return Text(f"{100 * value:.1f}", style=hue) if value else Text("dense", style="bold green")
