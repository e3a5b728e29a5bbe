"""`compress recipes`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from compressor.cli.show import out, table


def recipes(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME|FILE", help="Show this one.", show_default=False)
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON: name, command, description, settings.")
    ] = False,
) -> None:
    """List the recipes that come with the package, or show one.

    [bold]Examples[/bold]

    compress recipes

    compress recipes armor-24 > mine.toml

    compress prune org/model -o out --recipe mine.toml
    """
    from compressor.config.bundled_recipes import bundled, description, find

    if name is not None:
        path = find(name)
        print(json.dumps(_facts(path), indent=1) if as_json else _shown(path))
        return
    paths = list(bundled().values())
    if as_json:
        print(json.dumps([_facts(path) for path in paths], indent=1))
        return
    found = table("", "recipe command what-it-is")
    found.columns[-1].no_wrap = False
    for path in paths:
        found.add_row(path.stem, _facts(path)["command"], description(path))
    out.print(found)


def _shown(path: Path) -> str:
    """The file, and as comments the plan it names."""
    from compressor.config.bundled_recipes import bundled
    from compressor.errors import UsageError

    plan = _settings(path).get("plan")
    text = path.read_text(encoding="utf-8").rstrip()
    if not plan:
        return text
    name = f"{Path(plan)}:"
    if path in bundled().values():
        name = Path(plan).relative_to(path.parent).as_posix()
        name += (
            " comes with the package. A file of this name beside the recipe takes its place; this "
            "is what it says:"
        )
    try:
        lines = Path(plan).read_text(encoding="utf-8").rstrip().splitlines()
    except (OSError, ValueError):
        raise UsageError(f"recipe {path} names the plan {plan}, which cannot be read") from None
    return f"{text}\n\n# {name}\n" + "\n".join(f"#     {line}".rstrip() for line in lines)


def _facts(path: Path) -> dict[str, Any]:
    from compressor.config.bundled_recipes import description
    from compressor.config.recipe import Recipe
    from compressor.methods import command

    settings = _settings(path)
    runs = command(settings.get("method", Recipe.method))
    return {
        "name": path.stem,
        "command": runs,
        "description": description(path),
        "settings": settings,
    }


def _settings(path: Path) -> dict[str, Any]:
    """What the file says, each value of its kind."""
    from compressor.config.read import load
    from compressor.config.recipe import Recipe

    settings = load(path)
    Recipe(**{"model": "any", **settings})
    return settings
