"""`compress lowrank`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from compressor.cli import options
from compressor.cli.prune import plan_facts, run_and_show, show_left, show_tasks
from compressor.cli.show import begin, out

_EXAMPLES = """[bold]Examples[/bold]

compress lowrank org/model -o out --keep 70% --dataset text.jsonl

compress lowrank ./model -o out --method welore --keep 50%

compress lowrank ./model -o out --keep 60% --dataset text.jsonl --tune 4

compress lowrank ./model -o out --recipe mixed --dataset text.jsonl"""


def lowrank(
    model: options.Model,
    output: options.OutputFolder = None,
    method: Annotated[
        str | None, typer.Option(help="kfac, svd_llm, asvd, welore or svd.", show_default="kfac")
    ] = None,
    keep: options.Keep = None,
    ranks: options.Ranks = None,
    tune: Annotated[
        int | None,
        typer.Option(help="Epochs of training the factors, block by block.", show_default="0"),
    ] = None,
    plan: options.Plan = None,
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
            help="Option of the method, or of the ranks (ranks.align=32).",
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
        bool, typer.Option("--dry-run", help="Check everything, write nothing.")
    ] = False,
    as_json: options.ReportJson = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Replace linears by products of two thin factors, one decoder block in memory at a time."""
    from compressor.config.bundled_recipes import find
    from compressor.config.recipe import load, merge
    from compressor.errors import UsageError

    settings = {"method": "kfac", **(load(find(recipe)) if recipe else {})}
    given = {
        "model": model, "revision": revision, "method": method and method.replace("-", "_"),
        "keep": keep, "ranks": ranks,
        "tune": tune, "plan": str(plan) if plan else None,
        "dataset": dataset, "text_column": text_column,
        "num_samples": num_samples, "seq_len": seq_len,
        "seed": seed, "dtype": dtype, "expert_tokens": expert_tokens, "ignore": ignore,
        "trust_remote_code": trust_remote_code or None,
    }  # fmt: skip
    merged = merge(settings, given, assign or [])
    options.check_method(merged.method, "lowrank", None if method else recipe)
    if output is None and not dry_run:
        raise UsageError(
            "give the folder to make with -o/--output, or --dry-run to check everything"
        )
    begin(quiet, verbose)
    if output is None or dry_run:
        from compressor.run.check import plan_run

        planned = plan_run(merged, output)
        if as_json:
            print(json.dumps(plan_facts(planned, merged), indent=1))
            return
        if not merged.keep:
            show_tasks(planned)
        show_left(planned)
        goal = (
            f"factored by {merged.method}, keep {merged.keep} of the parameters"
            if merged.keep
            else "compressed as planned"
        )
        out.print(
            f"{len(planned.every)} linears in {len(planned.tasks)} blocks would be {goal}; nothing "
            f"was written"
        )
        return
    run_and_show(merged, output, device, max_memory, quiet=quiet, as_json=as_json)


lowrank.__doc__ = f"{lowrank.__doc__}\n\n{_EXAMPLES}"
