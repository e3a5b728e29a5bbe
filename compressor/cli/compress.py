"""What `compress prune` and `compress lowrank` do once they know what is asked: show what would be
done, or run and show what was done.
"""

from __future__ import annotations

import json
import signal
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compressor.cli.show import begin, err, out, pruning_progress, size, speaks, table, tell
from compressor.cli.streams import only_told

if TYPE_CHECKING:
    from compressor.config.recipe import Recipe
    from compressor.engine.plan import Plan
    from compressor.engine.task import Task
    from compressor.records.report import Report


def compress(
    recipe: Recipe,
    output: Path | None,
    device: str,
    max_memory: str,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
) -> None:
    """Make the folder `output` and print what became of it; with `dry_run` what would."""
    from compressor.errors import UsageError

    if output is None and not dry_run:
        raise UsageError("give the folder to make with -o/--output, or --dry-run to see the plan")
    begin(quiet, verbose)
    if output is not None and not dry_run:
        run_and_show(recipe, output, device, max_memory, quiet=quiet, as_json=as_json)
        return
    from compressor.run.pipeline import check_run

    plan = check_run(recipe, output, device=device, max_memory=max_memory)
    tell(plan.notes)
    if as_json:
        print(json.dumps(plan_facts(plan, recipe), indent=1))
    else:
        _show_plan(plan, recipe)


def run_and_show(
    recipe: Recipe, output: Path, device: str, max_memory: str, *, quiet: bool, as_json: bool
) -> None:
    """Prune and print the result; of several processes the first one speaks."""
    from compressor.errors import InterruptedRun, ProcessError
    from compressor.run.journal import describe, is_running
    from compressor.run.pipeline import prune as compress

    try:
        with pruning_progress(quiet or not speaks()) as progress:
            report = compress(
                recipe, output, device=device, max_memory=max_memory, progress=progress
            )
    except (KeyboardInterrupt, SystemExit) as end:
        code = end.code if isinstance(end, SystemExit) and isinstance(end.code, int) else 130
        if code == 128 + signal.SIGTERM and not speaks() and not is_running(output):
            # torchrun ends the others so when one is gone
            raise ProcessError(
                "another process of this run is gone: torchrun ended this one; "
                f"{describe(output) or 'nothing was written'}"
            ) from None
        raise InterruptedRun(
            f"interrupted: {describe(output) or 'nothing was written'}", code
        ) from None
    except ProcessError as error:
        raise ProcessError(f"{error}; {describe(output) or 'nothing was written'}") from None
    if not speaks():
        return
    tell(report.notes)
    if as_json:
        from compressor.records.report import to_json

        print(to_json(report.everything(), ascii_only=True), end="")
        return
    with only_told():
        if not quiet:
            _show_report(report)
        print(output)


def show_left(plan: Plan) -> None:
    """The weights that stay dense, a line each."""
    for left in plan.left_dense:
        out.print(f"dense          {left.name}  {left.shape}  {left.reason}")


def plan_facts(plan: Plan, recipe: Recipe) -> dict[str, Any]:
    """What would be done, for `--dry-run --json`. Ranks are yet to be chosen where a part of the
    parameters is kept.
    """
    asked = (
        {"keep": recipe.keep}
        if recipe.keep
        else {"plan": recipe.plan}
        if recipe.plan
        else {"pattern": recipe.pattern}
    )
    linears = [
        {
            "name": task.linear.name,
            "shape": list(task.linear.shape),
            "goal": f"keep {recipe.keep}" if task.target is None else _target(task),
        }
        for task in plan.every
    ]
    left_dense = [
        {"name": left.name, "shape": left.shape, "reason": left.reason} for left in plan.left_dense
    ]
    return {
        "model": recipe.model, "method": recipe.method, **asked, "seq_len": plan.seq_len,
        "blocks": len(plan.tasks), "linears": linears, "left_dense": left_dense,
    }  # fmt: skip


def _target(task: Task) -> str:
    return f"rank {task.target}" if isinstance(task.target, int) else str(task.target)


def show_tasks(plan: Plan) -> None:
    """What every linear becomes and by which method, a line each."""
    for task in plan.every:
        method = task.method.__name__.rpartition(".")[2]
        out.print(f"{method} {_target(task)}  {task.linear.name}  {list(task.linear.shape)}")


def _show_plan(plan: Plan, recipe: Recipe) -> None:
    """The dry run: where ranks are yet to be chosen, what stays dense is all that is known."""
    if not recipe.keep:
        show_tasks(plan)
    show_left(plan)
    if recipe.keep:
        goal = f"factored by {recipe.method}, keep {recipe.keep} of the parameters"
    elif any(isinstance(task.target, int) for task in plan.every):
        goal = "compressed as planned"
    else:
        packed = sum(map(plan.packs, plan.every))
        goal = f"pruned, {packed} stored packed 2:4, {len(plan.every) - packed} dense with zeros"
    out.print(
        f"{len(plan.every)} linears in {len(plan.tasks)} blocks would be {goal}; nothing was "
        f"written"
    )


def show_allocation(found: dict[str, Any]) -> None:
    """What the allocation measured, a line each."""
    if found.get("warning"):
        err.print(f"warning: {found['warning']}")
    if "budget" in found:
        kept = found["parameters"] / found["dense_parameters"]
        cut = f"ranks reduced by {found['rank_reduction']:.1%}"
        out.print(
            f"{found['parameters']:,} of {found['dense_parameters']:,} parameters kept "
            f"({kept:.2%}), {cut}, by {found['by']}"
        )
    if "divergence" in found:
        numbers = ", ".join(f"{name} {value:.4f}" for name, value in found["divergence"].items())
        out.print(
            f"KL to the dense model on {found['tokens']} calibration tokens: {numbers}; taken: "
            f"{found['taken']}"
        )


def _show_report(report: Report) -> None:
    from compressor.formats import form_class

    found = table("Compressed linears", "linear >shape format >zeros >error >held-out >bytes")
    for row in report.linears:
        errors = [
            "-" if error is None else f"{error:.4f}" for error in (row.error, row.held_out_error)
        ]
        form = form_class(row.format)
        zeros = f"{row.sparsity:.1%}" if form.SPARSE else "-"
        shape = "×".join(map(str, row.shape))
        found.add_row(row.name, shape, form.label(row.entry), zeros, *errors, size(row.bytes))
    out.print(found)
    show_allocation(report.allocation)
    totals = report.totals()
    inside = sum(left.reason != "outside the decoder blocks" for left in report.left_dense)
    out.print(
        f"left dense: {len(report.left_dense)} ({inside} inside the blocks); report.json says "
        f"which and why"
    )
    for note, count in Counter(row.note for row in report.linears if row.note).items():
        out.print(f"note: {count} linears: {note}")
    out.print(
        f"compressed linears {size(totals['dense_bytes'])} → {size(totals['bytes'])} "
        f"({totals['ratio']:.4f} of dense)"
    )
    out.print(f"checkpoint {size(report.input_bytes)} → {size(report.output_bytes)}")
    peak = " + ".join(
        f"{size(value)} {name.removesuffix('_bytes')}"
        for name, value in report.run["peak_memory"].items()
    )
    resumed = (
        f" from block {report.run['resumed_at_block']} on" if report.run["resumed_at_block"] else ""
    )
    out.print(
        f"{report.run['seconds']:.0f} s{resumed} on {report.run['device']}, peak memory {peak}"
    )
    if report.recipe["format"] == "packed" and totals["bytes"] == totals["dense_bytes"]:
        goals = "the plan" if report.recipe["plan"] else f"pattern {report.recipe['pattern']}"
        out.print(
            f"note: {goals} has no packed form: zeros are stored in place, the size stays the same"
        )
