"""What was asked for as one `Recipe`: a TOML file, what was given by hand over it, defaults under
it.

Recipes are TOML because YAML 1.1 reads `2:4` as the number 124. The complete recipe is written into
every output, so that any output can be made again from itself.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any

from compressor.config.bundled_recipes import find, find_plan
from compressor.config.keywords import as_text
from compressor.config.recipe import SETTINGS, Recipe
from compressor.errors import UsageError, did_you_mean
from compressor.methods import DEFAULT_FACTORIZATION, FACTORIZATIONS, METHODS

_KINDS = {entry.name: str(entry.type) for entry in fields(Recipe)}


def ask(
    command: str,
    model: str | Path,
    recipe: str | Path | None,
    given: Mapping[str, Any],
    assignments: Sequence[str] = (),
) -> Recipe:
    """What `command` was asked to do.

    Args:
        command: "prune", "lowrank" or "plan".
        model: folder or Hub id.
        recipe: file or name of a bundled one, under what is given.
        given: settings by name, None where one was not given.
        assignments: as `merge` takes them.

    Raises:
        TypeError: `given` has a name that is no setting of the command.
        UsageError: a value or a combination that cannot be used.
    """
    for name in given:
        if name not in SETTINGS[command]:
            hint = did_you_mean(name, SETTINGS[command])
            raise TypeError(f"{command}() got an unexpected keyword argument {name!r}{hint}")
    recipe = None if recipe is None else as_text("recipe", recipe)
    settings = load(find(recipe)) if recipe else {}
    values = {name: _plain(name, value) for name, value in {**given, "model": model}.items()}
    if isinstance(values.get("method"), str):
        values["method"] = values["method"].replace("-", "_")
    if command == "lowrank" or (command == "plan" and values.get("keep")):
        settings = {"method": DEFAULT_FACTORIZATION, **settings}
    asked = merge(settings, values, assignments)
    _check_together(command, asked, values, recipe)
    return asked


def _check_together(
    command: str, asked: Recipe, given: Mapping[str, Any], recipe: str | None
) -> None:
    """Raise UsageError for a method of the other command, or a pattern beside what replaces it."""
    pattern = given.get("pattern")
    if command != "plan":
        check_method(asked.method, command, None if given.get("method") else recipe)
    if command == "prune" and given.get("plan") and pattern:
        raise UsageError(
            f"`plan` says what every linear becomes; `pattern={pattern!r}` would not be used: give "
            f"one of them"
        )
    if command == "plan" and asked.keep and pattern:
        raise UsageError(
            f"`keep={asked.keep!r}` is for factors, `pattern={pattern!r}` for zeros: give one of "
            f"them"
        )


def check_method(method: str, command: str, recipe: str | None) -> None:
    """Raise UsageError where the other one of prune and lowrank runs the method; `recipe` is what
    named it, if one did.
    """
    right, does, theirs, ours = (
        ("lowrank", "makes factors", FACTORIZATIONS, METHODS)
        if command == "prune"
        else ("prune", "prunes", METHODS, FACTORIZATIONS)
    )
    if method in theirs:
        how = f" `recipe={recipe!r}`" if recipe else " `keep='70%'`" * (right == "lowrank")
        raise UsageError(
            f"method {method} {does}: use `compressor.{right}`{how}; accepted here: "
            f"{', '.join(ours)}"
        )


def _plain(name: str, value: Any) -> Any:
    """What Python may give for a setting, in the type that it has: a path is a text, a text where a
    list is meant is its one element.
    """
    if isinstance(value, PathLike):
        value = fspath(value)
    kind = _KINDS[name]
    if kind == "list[str]" and isinstance(value, str):
        return [value]
    if kind == "list[str]" and isinstance(value, Sequence | set | frozenset):
        return list(value) if isinstance(value, Sequence) else sorted(value)
    return dict(value) if kind == "dict[str, Any]" and isinstance(value, Mapping) else value


def load(path: Path) -> dict[str, Any]:
    """The settings of a recipe file, unknown keys refused. Raises UsageError."""
    try:
        settings = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UsageError(f"recipe {path} does not exist") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"recipe {path} is not readable TOML: {str(error)[:200]}") from None
    known = list(_KINDS)
    for key in settings:
        if key not in known:
            raise UsageError(
                f"recipe {path} has an unknown key {key!r}; known: "
                f"{', '.join(known)}{did_you_mean(key, known)}"
            )
    if isinstance(plan := settings.get("plan"), str) and plan:
        if Path(plan).is_absolute() or ".." in Path(plan).parts:
            raise UsageError(
                f"recipe {path} has the plan {plan[:200]!r}, which is not inside its folder; use "
                f"`plan` for another"
            )
        settings["plan"] = str(find_plan(plan, path))
    return settings


def merge(
    recipe: Mapping[str, Any], given: Mapping[str, Any], assignments: Sequence[str]
) -> Recipe:
    """A Recipe from file settings, given values that are not None, and `--set` assignments.

    `name=value` is an option of the method, `lsq.name=value` one of the refinement `lsq`,
    `ratios.name=value` one of the ratios, `ranks.name=value` one of the ranks.
    """
    asked = Recipe(
        **{**recipe, **{key: value for key, value in given.items() if value is not None}}
    )
    options = {
        name: dict(getattr(asked, name))
        for name in ("options", "refine_options", "ratio_options", "rank_options")
    }
    owners = {"": "options", "ratios": "ratio_options", "ranks": "rank_options"} | (
        {asked.refine: "refine_options"} if asked.refine else {}
    )
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        owner, dot, own_name = name.strip().rpartition(".")
        if not equals or not own_name:
            raise UsageError(f"--set {assignment!r} is not of the form name=value")
        if owner not in owners or (dot and not owner):
            raise UsageError(
                f"--set {assignment!r} is for {owner!r}, but `refine` is "
                f"{asked.refine or 'not given'}"
            )
        options[owners[owner]][own_name] = text.strip()
    return replace(asked, **options)
