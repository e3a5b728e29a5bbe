"""`compress prune`."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compressor.cli import options
from compressor.cli.show import begin, err, out, pruning_progress, size, speaks, table

if TYPE_CHECKING:
    from compressor.config.recipe import Recipe
    from compressor.engine.plan import Plan
    from compressor.engine.task import Task
    from compressor.records.report import Report

_EXAMPLES = """[bold]Examples[/bold]

compress prune org/model -o out --method sparsegpt --pattern 2:4 --dataset text.jsonl

compress prune ./model -o out --pattern 50% --format dense --ignore '*down_proj'

compress prune ./model -o out --pattern 60% --ratios curve --dataset text.jsonl

compress prune ./model -o out --recipe armor-24 --dataset text.jsonl

compress prune ./model -o out --recipe recipe.toml --set damp=0.05 --dry-run"""


def prune(
    model: options.Model,
    output: options.OutputFolder = None,
    method: Annotated[
        str | None,
        typer.Option(help="magnitude, wanda, nowag, sparsegpt or armor.", show_default="wanda"),
    ] = None,
    refine: Annotated[
        str | None,
        typer.Option(
            help="dsnot, lsq, swap or admm: improve it at no extra bytes.", show_default="none"
        ),
    ] = None,
    refine_only: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB",
            help="Linears to refine, such as '*attn*'; repeatable.",
            show_default="all",
        ),
    ] = None,
    tune: Annotated[
        int | None,
        typer.Option(help="Epochs of training the kept weights, block by block.", show_default="0"),
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option(
            help="n:m (n of every m weights are kept) or a sparsity such as 50%.",
            show_default="2:4",
        ),
    ] = None,
    ratios: options.Ratios = None,
    max_sparsity: options.MaxSparsity = None,
    dense_fraction: options.DenseFraction = None,
    plan: options.Plan = None,
    format: Annotated[
        str | None,
        typer.Option(help="packed (smaller) or dense (zeros in place).", show_default="packed"),
    ] = None,
    dataset: options.Dataset = None,
    text_column: options.TextColumn = None,
    num_samples: options.NumSamples = None,
    seq_len: options.SeqLen = None,
    seed: options.Seed = None,
    recipe: options.RecipeName = None,
    assign: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help=(
                "Option of the method, or of the refinement (lsq.damping=0.1) or the ratios; "
                "repeatable."
            ),
            show_default=False,
        ),
    ] = None,
    ignore: options.Ignore = None,
    device: options.Device = "auto",
    max_memory: options.MaxMemory = "",
    dtype: options.Dtype = None,
    expert_tokens: options.ExpertTokens = None,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, show the plan, write nothing.")
    ] = False,
    as_json: options.ReportJson = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Prune a checkpoint, one decoder block in memory at a time."""
    from compressor.config.bundled_recipes import find
    from compressor.config.recipe import load, merge
    from compressor.errors import UsageError

    given = {
        "model": model, "revision": revision, "method": method, "refine": refine,
        "refine_only": refine_only, "tune": tune, "pattern": pattern,
        "ratios": ratios, "dense_fraction": dense_fraction,
        "plan": str(plan) if plan else None, "format": format,
        "dataset": dataset, "text_column": text_column,
        "num_samples": num_samples, "seq_len": seq_len, "seed": seed,
        "dtype": dtype,
        "expert_tokens": expert_tokens, "ignore": ignore,
        "trust_remote_code": trust_remote_code or None,
    }  # fmt: skip
    assign = [*(assign or []), *most(max_sparsity)]
    merged = merge(load(find(recipe)) if recipe else {}, given, assign)
    options.check_method(merged.method, "prune", None if method else recipe)
    if plan and pattern:
        raise UsageError(
            f"--plan says what every linear becomes; --pattern {pattern} would not be used: give "
            f"one of them"
        )
    if output is None and not dry_run:
        raise UsageError("give the folder to make with -o/--output, or --dry-run to see the plan")
    begin(quiet, verbose)
    if output is None or dry_run:
        from compressor.run.check import plan_run

        planned = plan_run(merged, output)
        if as_json:
            print(json.dumps(plan_facts(planned, merged), indent=1))
        else:
            _show_plan(planned)
        return
    run_and_show(merged, output, device, max_memory, quiet=quiet, as_json=as_json)


def run_and_show(
    recipe: Recipe, output: Path, device: str, max_memory: str, *, quiet: bool, as_json: bool
) -> None:
    """Prune and print the result; of several processes the first one speaks."""
    import compressor
    from compressor.errors import InterruptedRun, ProcessError
    from compressor.run.journal import describe

    try:
        with pruning_progress(quiet or not speaks()) as progress:
            report = compressor.prune(
                output=output,
                device=device,
                max_memory=max_memory,
                progress=progress,
                **asdict(recipe),
            )
    except (KeyboardInterrupt, SystemExit) as end:
        code = end.code if isinstance(end, SystemExit) and isinstance(end.code, int) else 130
        raise InterruptedRun(
            f"interrupted: {describe(output) or 'nothing was written'}", code
        ) from None
    except ProcessError as error:
        raise ProcessError(f"{error}; {describe(output) or 'nothing was written'}") from None
    if not speaks():
        return
    if as_json:
        from compressor.records.report import to_json

        print(to_json(report.everything(), ascii_only=True), end="")
    elif not quiet:
        _show_report(report)
    if not as_json:
        print(output)


prune.__doc__ = f"{prune.__doc__}\n\n{_EXAMPLES}"


def most(max_sparsity: str | None) -> list[str]:
    """`--max-sparsity` as an assignment, if it was given."""
    from compressor.pattern import parse_fraction

    return (
        [f"ratios.max_sparsity={float(parse_fraction('max-sparsity', max_sparsity))}"]
        if max_sparsity
        else []
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


def show_left(planned: Plan) -> None:
    """The weights that stay dense, a line each."""
    for left in planned.left_dense:
        out.print(f"dense          {left.name}  {left.shape}  {left.reason}")


def plan_facts(planned: Plan, recipe: Recipe) -> dict[str, Any]:
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
        for task in planned.every
    ]
    left_dense = [
        {"name": left.name, "shape": left.shape, "reason": left.reason}
        for left in planned.left_dense
    ]
    return {
        "model": recipe.model, "method": recipe.method, **asked, "seq_len": planned.seq_len,
        "blocks": len(planned.tasks), "linears": linears, "left_dense": left_dense,
    }  # fmt: skip


def _target(task: Task) -> str:
    return f"rank {task.target}" if isinstance(task.target, int) else str(task.target)


def show_tasks(planned: Plan) -> None:
    """What every linear becomes and by which method, a line each."""
    for task in planned.every:
        method = task.method.__name__.rpartition(".")[2]
        out.print(f"{method} {_target(task)}  {task.linear.name}  {list(task.linear.shape)}")


def _show_plan(planned: Plan) -> None:
    show_tasks(planned)
    show_left(planned)
    packed = sum(map(planned.packs, planned.every))
    stored = f"{packed} stored packed 2:4, {len(planned.every) - packed} dense with zeros"
    out.print(
        f"{len(planned.every)} linears in {len(planned.tasks)} blocks would be pruned, {stored}; "
        f"nothing was written"
    )


def _show_report(report: Report) -> None:
    from compressor.formats import form_class

    found = table("Compressed linears", "linear >shape format >zeros >error >bytes")
    for row in report.linears:
        error = "-" if row.error is None else f"{row.error:.4f}"
        form = form_class(row.format)
        zeros = f"{row.sparsity:.1%}" if form.SPARSE else "-"
        shape = "×".join(map(str, row.shape))
        found.add_row(row.name, shape, form.label(row.entry), zeros, error, size(row.bytes))
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
