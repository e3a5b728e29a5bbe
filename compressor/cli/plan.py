"""`compress plan`: what every linear would become, as a file to read, edit and prune with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from compressor.cli import options
from compressor.cli.prune import most, show_allocation
from compressor.cli.show import err, out, pruning_progress, quiet_libraries, table

if TYPE_CHECKING:
    from compressor.job import Job

_EXAMPLES = """[bold]Examples[/bold]

compress plan org/model -o plan.toml --pattern 60% --ratios curve --dataset text.jsonl --plot plan.png

compress prune org/model -o out --plan plan.toml --method sparsegpt --dataset text.jsonl"""


def plan(
    model: options.Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="File to make; must not exist.", show_default=False)],
    plot: Annotated[Path | None, typer.Option(help="Draw it too: a .png, .svg or .pdf file.", show_default=False)] = None,
    method: Annotated[str | None, typer.Option(help="As for prune: curves are measured with it.", show_default="wanda")] = None,
    refine: Annotated[str | None, typer.Option(help="As for prune: plans are tried with it.", show_default="none")] = None,
    pattern: Annotated[str | None, typer.Option(help="n:m, or a sparsity such as 60%.", show_default="2:4")] = None,
    ratios: options.Ratios = None,
    max_sparsity: options.MaxSparsity = None,
    dense_fraction: options.DenseFraction = None,
    dataset: options.Dataset = None,
    num_samples: options.NumSamples = None,
    seq_len: options.SeqLen = None,
    seed: options.Seed = None,
    recipe: options.RecipeName = None,
    assign: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="As for prune, such as ratios.tokens=4096.", show_default=False),
    ] = None,
    ignore: options.Ignore = None,
    device: options.Device = "auto",
    dtype: options.Dtype = None,
    revision: options.Revision = None,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print what was measured as JSON.")] = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Choose what every linear becomes and write it to a file; the checkpoint is only read."""
    from compressor.bundled import find
    from compressor.errors import OutputError
    from compressor.recipe import load, merge

    given = {
        "model": model, "revision": revision, "method": method, "refine": refine, "pattern": pattern, "ratios": ratios,
        "dense_fraction": dense_fraction, "dataset": dataset, "num_samples": num_samples, "seq_len": seq_len, "seed": seed,
        "dtype": dtype, "ignore": ignore, "trust_remote_code": trust_remote_code or None,
    }  # fmt: skip
    merged = merge(load(find(recipe)) if recipe else {}, given, [*(assign or []), *most(max_sparsity)])
    for path in (output, plot):
        if path and (path.exists() or not path.resolve().parent.is_dir()):
            raise OutputError(f"{path} exists already" if path.exists() else f"the folder of {path} does not exist")
    if not quiet:
        err.print("loading libraries …", style="dim")
    from compressor import heatmap
    from compressor.pipeline import make_plan
    from compressor.plan import dumps

    if plot:
        heatmap.check_drawing(plot)
    quiet_libraries(verbose)
    with pruning_progress(quiet) as progress:
        job = make_plan(merged, device=device, progress=progress)
    part = output.with_name(f"{output.name}.part")
    part.write_text(dumps(job), encoding="utf-8")
    part.replace(output)
    if plot:
        chosen = merged.ratios or (f"{merged.dense_fraction} dense" if merged.dense_fraction else "one goal")
        heatmap.draw(job, plot, f"{Path(merged.model).name}: {merged.pattern}, {chosen}")
    if as_json:
        print(json.dumps(job.allocation, indent=1))
        return
    if not quiet:
        _show(job)
    print(output)


plan.__doc__ = f"{plan.__doc__}\n\n{_EXAMPLES}"


def _show(job: Job) -> None:
    from compressor.heatmap import sparsities

    columns, blocks = sparsities(job)
    found = table("Zeros of every linear, %", " ".join(["block", *(f">{name.rpartition('.')[2]}" for name in columns)]))
    for index, row in enumerate(blocks):
        found.add_row(str(index), *("" if value is None else _coloured(value) for value in row))
    out.print(found)
    weights: Any = {linear.name: linear.size for index in range(len(blocks)) for linear in job.skeleton.linears(index)}
    zeros = sum(task.removed * task.linear.size for task in job.every)
    out.print(f"{round(zeros)} of {sum(weights.values())} weights pruned, {zeros / sum(weights.values()):.2%}")
    show_allocation(job.allocation)


def _coloured(value: float) -> Text:
    """Green for what stays, through yellow, to red for what goes."""
    hue = "green" if value < 0.4 else "yellow" if value < 0.6 else "dark_orange" if value < 0.75 else "red"
    return Text(f"{100 * value:.1f}", style=hue) if value else Text("dense", style="bold green")
