"""`compress pack`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from compressor.cli import options
from compressor.cli.show import err, quiet_libraries, tell_of


def pack(
    folder: Annotated[
        Path,
        typer.Argument(
            metavar="DIR", help="A dense checkpoint with 2:4 zeros in place.", show_default=False
        ),
    ],
    output: options.NewFolder,
    trust_remote_code: options.TrustRemoteCode = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print what was packed and what was not as JSON.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No messages.")] = False,
) -> None:
    """Pack a checkpoint that is 2:4 already, made by any tool that stores zeros in place. No
    calibration, no weight changes.

    [bold]Example[/bold]

    compress pack sparse-model -o out
    """
    from compressor.tools.pack import pack as run

    quiet_libraries(False)
    done = run(folder, output, trust_remote_code=trust_remote_code)
    tell_of(folder, code=trust_remote_code)
    if not quiet:
        for left in done.left_dense:
            err.print(f"dense  {left.name}  {left.shape}  {left.reason}", soft_wrap=True)
        err.print(
            f"{len(done.packed)} linears packed, {len(done.left_dense)} of the blocks left dense"
        )
    print(json.dumps(asdict(done), indent=1) if as_json else output)
