"""`compress doctor`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated

import typer

from compressor.cli.show import err, out

if TYPE_CHECKING:
    from compressor.doctor import Finding

_COLOURS = {"ok": "green", "missing": "yellow", "broken": "red"}


def doctor(
    build: Annotated[
        bool, typer.Option("--build", help="Compile the CPU kernels now, not at the first load.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Look at this machine: versions, devices, whether the kernels work, room. Exit code 1 if
    something is broken.

    [bold]Examples[/bold]

    compress doctor

    compress doctor --build
    """
    from compressor.doctor import examine

    if not as_json and err.is_terminal:
        err.print("loading libraries …", style="dim")
    found = examine(build)
    broken = any(finding.state == "broken" for finding in found)
    if as_json:
        print(json.dumps([vars(finding) for finding in found], indent=1))
    else:
        _show(found)
    raise typer.Exit(1 if broken else 0)


def _show(found: list[Finding]) -> None:
    from rich.text import Text

    group = ""
    width = max(len(finding.name) for finding in found)
    for finding in found:
        if finding.group != group:
            group = finding.group
            out.print(group, style="bold")
        state = Text(f"{finding.state:<7}", style=_COLOURS[finding.state])
        out.print(Text.assemble("  ", state, f"  {finding.name:<{width}}  {finding.text}"))
