"""`compress resume`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from compressor.checkpoint.work_state import remove_dead
from compressor.cli import options
from compressor.cli.compress import run_and_show
from compressor.cli.show import begin
from compressor.errors import CheckpointError


def resume(
    output: Annotated[
        Path,
        typer.Argument(metavar="OUT", help="The folder that was to be made.", show_default=False),
    ],
    as_json: options.ReportJson = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = False,
) -> None:
    """Go on with a run of prune or lowrank that was cut off, from the block it was in. The same as
    giving its command again.

    [bold]Example[/bold]

    compress resume out
    """
    from compressor.config.recipe import Recipe
    from compressor.run.journal import read_settings

    remove_dead(output)
    settings = read_settings(output)
    output = output.resolve()
    if not Path(settings["folder"]).is_dir():
        raise CheckpointError(
            f"the run of {output} was begun in {settings['folder']}, which is no folder any more"
        )
    os.chdir(
        settings["folder"]
    )  # names of model and text are relative to where the command was given
    begin(quiet, verbose)
    run_and_show(
        Recipe(**settings["recipe"]),
        output,
        settings["device"],
        settings["max_memory"],
        quiet=quiet,
        as_json=as_json,
    )
