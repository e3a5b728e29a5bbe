"""`compress prune`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from compressor.cli import options
from compressor.cli.compress import compress


@options.takes_settings("prune")
def prune(
    model: options.Model,
    output: options.OutputFolder = None,
    *,
    max_sparsity: options.MaxSparsity = None,
    recipe: options.RecipeName = None,
    assign: options.Assign = None,
    device: options.Device = "auto",
    max_memory: options.MaxMemory = "",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check everything, show the plan, write nothing.")
    ] = False,
    as_json: options.ReportJson = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
    **given: Any,
) -> None:
    """Prune a checkpoint, one decoder block in memory at a time.

    [bold]Examples[/bold]

    compress prune org/model -o out --method sparsegpt --pattern 2:4 --dataset text.jsonl

    compress prune ./model -o out --pattern 50% --format dense --ignore '*down_proj'

    compress prune ./model -o out --pattern 60% --ratios curve --dataset text.jsonl

    compress prune ./model -o out --method sparsegpt --match 0.5 --dataset text.jsonl

    compress prune ./model -o out --recipe armor-24 --dataset text.jsonl

    compress prune ./model -o out --recipe recipe.toml --set damp=0.05 --dry-run
    """
    from compressor.config.read import ask

    asked = ask("prune", model, recipe, given, options.assignments(assign, max_sparsity))
    compress(asked, output, device, max_memory, dry_run, as_json, quiet, verbose)
