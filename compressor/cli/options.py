"""Options that several commands take: each means one thing, and says it in one way. And the check
that prune and lowrank share.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(help="Checkpoint folder or Hub id.", show_default=False)]
OutputFolder = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Folder to make; must not exist.", show_default=False),
]
NewFolder = Annotated[
    Path, typer.Option("--output", "-o", help="Folder to make; must not exist.", show_default=False)
]
Dataset = Annotated[
    str | None,
    typer.Option(
        help="Calibration: .txt, .jsonl or .parquet file, Hub id, or self.", show_default="self"
    ),
]
TextColumn = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Field of the records that has the text, or a chat.",
        show_default="text, messages or conversations",
    ),
]
NumSamples = Annotated[int | None, typer.Option(help="Calibration sequences.", show_default="128")]
SeqLen = Annotated[
    int | None, typer.Option(help="Tokens in each.", show_default="min(2048, the model's limit)")
]
Seed = Annotated[int | None, typer.Option(help="Of the calibration samples.", show_default="0")]
RecipeName = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|FILE",
        help="Bundled recipe or TOML file; options given here win.",
        show_default=False,
    ),
]
Keep = Annotated[
    str | None,
    typer.Option(help="Part of the linears' parameters to keep, such as 70%.", show_default=False),
]
Ranks = Annotated[
    str | None,
    typer.Option(
        help="uniform, welore or threshold: how ranks are shared out.",
        show_default="the method's own",
    ),
]
Ratios = Annotated[
    str | None,
    typer.Option(
        help="uniform, ecoflap, owl or curve: share the zeros of a sparsity out.",
        show_default="none",
    ),
]
MaxSparsity = Annotated[
    str | None,
    typer.Option(help="Of any block or linear, with --ratios.", show_default="the allocator's own"),
]
DenseFraction = Annotated[
    str | None,
    typer.Option(help="Of the weights, stay dense where n:m hurts most: 10%.", show_default="none"),
]
Plan = Annotated[
    Path | None,
    typer.Option(
        help="What every linear becomes: a file of `compress plan`, or the plan.toml of a folder.",
        show_default=False,
    ),
]
Ignore = Annotated[
    list[str] | None,
    typer.Option(metavar="GLOB", help="Linears that stay dense; repeatable.", show_default=False),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")]
MaxMemory = Annotated[
    str,
    typer.Option(
        help=(
            "Of the host, such as 8GB: hidden states that do not fit rest on disk, Gram matrices "
            "are built in groups."
        ),
        show_default="half of what is free",
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(help="Of the forward passes; stored dtypes never change.", show_default="auto"),
]
ExpertTokens = Annotated[
    str | None,
    typer.Option(
        help=(
            "What calibrates the experts of a mixture: the tokens routed to each (all where those "
            "are few), or all."
        ),
        show_default="routed",
    ),
]
Revision = Annotated[str | None, typer.Option(help="Of a Hub id.", show_default=False)]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that the checkpoint brings.")
]
ReportJson = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no table.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Let the libraries speak too.")]


def check_method(method: str, own: str, recipe: str | None) -> None:
    """Raise UsageError where the other one of prune and lowrank runs the method; `recipe` is what
    named it, if one did.
    """
    from compressor.errors import UsageError
    from compressor.methods import FACTORIZATIONS, METHODS

    right, does, theirs, ours = (
        ("lowrank", "makes factors", FACTORIZATIONS, METHODS)
        if own == "prune"
        else ("prune", "prunes", METHODS, FACTORIZATIONS)
    )
    if method in theirs:
        how = f" --recipe {recipe}" if recipe else " --keep 70%" if right == "lowrank" else ""
        raise UsageError(
            f"method {method} {does}: use compress {right}{how}; accepted here: {', '.join(ours)}"
        )
