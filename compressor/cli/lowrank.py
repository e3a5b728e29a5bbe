"""`compress lowrank`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compressor.cli.prune import run_and_show, show_left
from compressor.cli.show import err, out, quiet_libraries

_EXAMPLES = """[bold]Examples[/bold]

compress lowrank org/model -o out --keep 70% --dataset text.jsonl

compress lowrank ./model -o out --method welore --keep 50%

compress lowrank ./model -o out --keep 60% --dataset text.jsonl --tune 4"""


def lowrank(
    model: Annotated[str, typer.Argument(help="Checkpoint folder or Hub id.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder to make; must not exist.", show_default=False)
    ] = None,
    method: Annotated[str | None, typer.Option(help="kfac, svd_llm, asvd, welore or svd.", show_default="kfac")] = None,
    keep: Annotated[str | None, typer.Option(help="Of the parameters of the linears: 70%.", show_default=False)] = None,
    ranks: Annotated[
        str | None, typer.Option(help="uniform, welore or threshold: share them out.", show_default="the method's own")
    ] = None,
    tune: Annotated[int | None, typer.Option(help="Epochs of training the factors, block by block.", show_default="0")] = None,
    plan: Annotated[
        Path | None, typer.Option(help="What every linear becomes: a file such as OUT/plan.toml.", show_default=False)
    ] = None,
    dataset: Annotated[
        str | None, typer.Option(help="Calibration: .txt, .jsonl or .parquet file, Hub id, or self.", show_default="self")
    ] = None,
    num_samples: Annotated[int | None, typer.Option(help="Calibration sequences.", show_default="128")] = None,
    seq_len: Annotated[int | None, typer.Option(help="Tokens in each.", show_default="min(2048, the model's limit)")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the calibration samples.", show_default="0")] = None,
    recipe: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE", help="Bundled recipe or TOML file; options given here win.", show_default=False),
    ] = None,
    assign: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="NAME=VALUE", help="Option of the method, or of the ranks (ranks.align=32).", show_default=False
        ),
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(metavar="GLOB", help="Linears that stay dense; repeatable.", show_default=False)
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")] = "auto",
    max_memory: Annotated[
        str,
        typer.Option(
            help="Of the host, such as 8GB: hidden states that do not fit rest on disk.", show_default="half of what is free"
        ),
    ] = "",
    dtype: Annotated[str | None, typer.Option(help="Of the forward passes.", show_default="auto")] = None,
    expert_tokens: Annotated[
        str | None, typer.Option(help="What calibrates experts: all tokens, or those routed to each.", show_default="all")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Of a Hub id.", show_default=False)] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that the checkpoint brings.")
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything, write nothing.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no table.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Let the libraries speak too.")] = False,
) -> None:
    """Replace linears by products of two thin factors, one decoder block in memory at a time."""
    from compressor.bundled import find
    from compressor.errors import UsageError
    from compressor.methods import FACTORIZATIONS, METHODS
    from compressor.recipe import load, merge

    settings = {"method": "kfac", **(load(find(recipe)) if recipe else {})}
    given = {
        "model": model, "revision": revision, "method": method and method.replace("-", "_"), "keep": keep, "ranks": ranks,
        "tune": tune, "plan": str(plan) if plan else None, "dataset": dataset, "num_samples": num_samples, "seq_len": seq_len,
        "seed": seed, "dtype": dtype, "expert_tokens": expert_tokens, "ignore": ignore,
        "trust_remote_code": trust_remote_code or None,
    }  # fmt: skip
    merged = merge(settings, given, assign or [])
    if merged.method in METHODS:
        raise UsageError(f"method {merged.method} prunes: use compress prune; accepted here: {', '.join(FACTORIZATIONS)}")
    if output is None and not dry_run:
        raise UsageError("give the folder to make with -o/--output, or --dry-run to check everything")
    if not quiet:
        err.print("loading libraries …", style="dim")
    quiet_libraries(verbose)
    if output is None or dry_run:
        from compressor.job import make_job

        job = make_job(merged, output)
        goal = f"keep {merged.keep} of the parameters" if merged.keep else "as planned"
        show_left(job)
        out.print(f"{len(job.every)} linears in {len(job.tasks)} blocks would be factored by {merged.method}, {goal}")
        return
    run_and_show(merged, output, device, max_memory, quiet=quiet, as_json=as_json)


lowrank.__doc__ = f"{lowrank.__doc__}\n\n{_EXAMPLES}"
