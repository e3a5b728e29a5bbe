"""`compress lowrank`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from compressor.cli import options
from compressor.cli.compress import compress


@options.takes_settings("lowrank")
def lowrank(
    model: options.Model,
    output: options.OutputFolder = None,
    *,
    recipe: options.RecipeName = None,
    assign: options.Assign = None,
    device: options.Device = "auto",
    max_memory: options.MaxMemory = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, write nothing.")
    ] = False,
    as_json: options.ReportJson = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    **given: Any,
) -> None:
    """Replace linears by weights of low rank, two thin matrices each, one decoder block in memory
    at a time.

    [bold]Examples[/bold]

    compress lowrank org/model -o out --keep 70% --dataset text.jsonl

    compress lowrank ./model -o out --method welore --keep 50%

    compress lowrank ./model -o out --keep 60% --dataset text.jsonl --tune 4

    compress lowrank ./model -o out --recipe mixed --dataset text.jsonl
    """
    from compressor.config.read import ask

    asked = ask("lowrank", model, recipe, given, options.assignments(assign))
    compress(asked, output, device, max_memory, dry_run, as_json, quiet, verbose)
