"""`compress verify`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from compressor.cli import options
from compressor.cli.show import counting, out, quiet_libraries


def verify(
    folder: Annotated[
        Path,
        typer.Argument(metavar="DIR", help="A folder that this package made.", show_default=False),
    ],
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="No progress; print problems only.")
    ] = False,
) -> None:
    """Check a finished folder: checksums, headers, patterns, packed tensors, finite numbers, and
    that config, parameters and tokenizer load. Exit code 1 for any problem.

    [bold]Example[/bold]

    compress verify out
    """
    from compressor.tools.verify import verify as run

    quiet_libraries(False)
    with counting("verifying", quiet) as progress:
        found = run(folder, progress, trust_remote_code=trust_remote_code)
    if as_json:
        print(json.dumps({"folder": str(folder), **found}, indent=1))
    else:
        for problem in found["problems"]:
            print(problem)
        if not found["problems"] and not quiet:
            out.print(
                f"{folder} is sound: {found['files']} files, {found['tensors']} tensors, "
                f"{found['linears']} compressed linears"
            )
    if found["problems"]:
        raise typer.Exit(1)
