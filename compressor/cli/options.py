"""The options of the commands. Settings come from their table (compressor/config/recipe.py); what
several commands take beside them means one thing, and is said in one way.
"""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import typer

from compressor.config.recipe import SETTINGS, Recipe, said

_KINDS = {entry.name: str(entry.type) for entry in fields(Recipe)}
_TYPES: Mapping[str, Any] = {"str": str | None, "int": int | None, "list[str]": list[str] | None}
_COMMANDS = {"evaluate": "eval"}  # functions of another name than their command
_QUOTES = "'\""

Model = Annotated[str, typer.Argument(help=said("model", "").help, show_default=False)]
OutputFolder = Annotated[
    Path | None,
    typer.Option("--output", "-o", help="Folder to make; must not exist.", show_default=False),
]
NewFolder = Annotated[
    Path, typer.Option("--output", "-o", help="Folder to make; must not exist.", show_default=False)
]
RecipeName = Annotated[
    str | None,
    typer.Option(
        metavar="NAME|FILE",
        help="Bundled recipe or TOML file; options given here win.",
        show_default=False,
    ),
]
Assign = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help=(
            "Option of the method, or of the refinement (lsq.damping=0.1), the ratios "
            "(ratios.tokens=4096) or the ranks (ranks.align=32); repeatable."
        ),
        show_default=False,
    ),
]
MaxSparsity = Annotated[
    str | None,
    typer.Option(help="Of any block or linear, with --ratios.", show_default="the allocator's own"),
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
TextColumn = Annotated[
    str | None,
    typer.Option(help=said("text_column", "").help, show_default=said("text_column", "").default),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help=said("trust_remote_code", "").help)
]
ReportJson = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no table.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Let the libraries speak too.")]


def takes_settings(command: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The function gets the settings of `command` in place of its `**given`, None where an option
    was not given; Typer sees an option for each, before the function's own keywords.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        own = [
            parameter
            for parameter in inspect.signature(function, eval_str=True).parameters.values()
            if parameter.kind is not parameter.VAR_KEYWORD
        ]
        first = [parameter for parameter in own if parameter.kind is not parameter.KEYWORD_ONLY]
        options = [
            _parameter(command, name)
            for name in SETTINGS[command]
            if not _KINDS[name].startswith("dict")
        ]
        signature = inspect.Signature([*first, *options, *own[len(first) :]])
        function.__signature__ = signature  # type: ignore[attr-defined]  # what inspect reads first
        return function

    return decorate


def _parameter(command: str, name: str) -> inspect.Parameter:
    """The option of one setting."""
    kind, (text, default) = _KINDS[name], said(name, command)
    many = kind == "list[str]"
    option = typer.Option(
        flag(name),
        metavar="GLOB" if many else None,
        help=as_flags(f"{text.removesuffix('.')}; repeatable." if many else text),
        show_default=as_flags(default) if default and kind != "bool" else False,
    )
    of = Path | None if name == "plan" else bool | None if kind == "bool" else _TYPES[kind]
    return inspect.Parameter(
        name,
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[of, option],
    )


def assignments(assign: list[str] | None, max_sparsity: str | None = None) -> list[str]:
    """All that `--set` says; `--max-sparsity` is one such assignment."""
    from compressor.pattern import parse_fraction

    if not max_sparsity:
        return assign or []
    most = float(parse_fraction("max_sparsity", max_sparsity))
    return [*(assign or []), f"ratios.max_sparsity={most}"]


def flag(name: str) -> str:
    """The option of a setting."""
    return "--set" if _KINDS[name].startswith("dict") else f"--{name.replace('_', '-')}"


FLAGS: Mapping[str, str] = {name: flag(name) for name in _KINDS if name != "model"}
"""Keyword of Python -> option, of every setting."""


def as_flags(message: str, flags: Mapping[str, str] = FLAGS) -> str:
    """A message of the library in the words of the command line: it names keywords of Python as
    `seq_len` or `keep='70%'`, and functions as `compressor.lowrank`.
    """

    def spoken(found: re.Match[str]) -> str:
        function, name, value = found.groups()
        if function:
            return f"compress {_COMMANDS.get(function, function)}"
        if name not in flags:
            return found[0]
        return flags[name] + (f" {shlex.quote(value.strip(_QUOTES))}" if value else "")

    return re.sub(r"`(?:compressor\.([a-z]+)|([a-z_]+)(?:=([^`]+))?)`", spoken, message)
