"""`compress report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def report(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="A folder that prune or lowrank made.", show_default=False
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="File to make; must not exist.", show_default="DIR.report.html"
        ),
    ] = None,
    png: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER", help="Write the charts as PNG files too.", show_default=False
        ),
    ] = None,
) -> None:
    """Show a run on one HTML page: sizes, errors, scores, time, and what was left dense.

    The page is a single file without scripts. Scores are shown where `compress eval` has stored
    them.

    [bold]Examples[/bold]

    compress report out

    compress report out -o out.html --png charts
    """
    from compressor.checkpoint.atomic import write_output
    from compressor.errors import OutputError
    from compressor.page import draw, read_record, render

    beside = folder.resolve()
    target = output or beside.with_name(f"{beside.name}.report.html")
    if target.exists():
        raise OutputError(f"output {target} exists already; choose another with -o or remove it")
    if not target.resolve().parent.is_dir():
        raise OutputError(
            f"output {target} cannot be written: {target.resolve().parent} is not a folder"
        )
    record = read_record(folder)
    text = render(record)
    if png is not None:
        from compressor.plots.picture import write_pictures

        write_pictures(draw(record), png)
    # names from a file may hold halves of a surrogate pair
    write_output(target, text.encode("utf-8", "replace"))
    print(output or folder.with_name(target.name))
