"""`compress unpack`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from compressor.cli import options
from compressor.cli.show import err, tell_of


def unpack(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="A packed checkpoint.", show_default=False)
    ],
    output: options.NewFolder,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No messages.")] = False,
) -> None:
    """Turn a packed checkpoint back into a plain dense one that every tool reads.

    [bold]Example[/bold]

    compress unpack out -o out-dense
    """
    from compressor.tools.unpack import unpack as run

    count = run(folder, output)
    tell_of(folder)
    if not quiet:
        err.print(f"{count} packed linears are dense again")
    print(output)
