"""`compress import`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compressor.cli import options
from compressor.cli.show import err, tell_of


def import_legacy(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            help="A compressed-tensors checkpoint, sparse-24-bitmask.",
            show_default=False,
        ),
    ],
    output: options.NewFolder,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No messages.")] = False,
) -> None:
    """Bring a compressed-tensors checkpoint in its retired `sparse-24-bitmask` format into the
    packed format, without loss.

    [bold]Example[/bold]

    compress import Llama-2of4 -o out
    """
    from compressor.tools.import_bitmask import import_bitmask

    packed, dense = import_bitmask(folder, output)
    tell_of(folder)
    if not quiet:
        err.print(f"{packed} linears packed, {dense} outside the decoder blocks written dense")
    print(output)
