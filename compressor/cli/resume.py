"""`compress resume`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from compressor.cli.prune import run_and_show
from compressor.cli.show import err, quiet_libraries, speaks
from compressor.errors import CheckpointError


def resume(
    output: Annotated[Path, typer.Argument(metavar="OUT", help="The folder that was to be made.", show_default=False)],
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no table.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Let the libraries speak too.")] = False,
) -> None:
    """Go on with a `prune` that was cut off, from the block it was in. The same as giving its command again.

    [bold]Example[/bold]

    compress resume out
    """
    from compressor.journal import read_settings
    from compressor.recipe import Recipe

    settings = read_settings(output)
    output = output.resolve()
    if not Path(settings["folder"]).is_dir():
        raise CheckpointError(f"the run of {output} was begun in {settings['folder']}, which is no folder any more")
    os.chdir(settings["folder"])  # names of model and text are relative to where the command was given
    if speaks() and not quiet:
        err.print("loading libraries …", style="dim")
    quiet_libraries(verbose)
    run_and_show(Recipe(**settings["recipe"]), output, settings["device"], settings["max_memory"], quiet=quiet, as_json=as_json)
