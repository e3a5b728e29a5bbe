"""The recipes that come with the package: `recipes/*.toml`, each for a result worth repeating.

A bundled recipe names no model. Its first comment line says what it is for, the rest of the comment
the command that was run and the numbers it reached.
"""

from __future__ import annotations

from pathlib import Path

from compressor.errors import UsageError, did_you_mean
from compressor.text import home_path

_PACKAGE = Path(__file__).parents[1]
_INSTALLED, _CHECKOUT = _PACKAGE / "recipes", _PACKAGE.parent / "recipes"


def _folder() -> Path:
    return _INSTALLED if _INSTALLED.is_dir() else _CHECKOUT


def bundled() -> dict[str, Path]:
    """Name -> file of every bundled recipe, by name."""
    return {path.stem: path for path in sorted(_folder().glob("*.toml"))}


def find(recipe: str | Path) -> Path:
    """The file of `recipe`: a path, or the name of a bundled one; the path wins where there is such
    a file.

    Raises:
        UsageError: neither.
    """
    path, known = home_path(recipe), bundled()
    if _is_file(path) or path.suffix == ".toml":
        return path
    if str(recipe) not in known:
        names, hint = ", ".join(known), did_you_mean(str(recipe), list(known))
        raise UsageError(
            f"recipe {str(recipe)[:200]!r} is no file and no bundled recipe; bundled: {names}{hint}"
        )
    return known[str(recipe)]


def find_plan(plan: str, recipe: Path) -> Path:
    """The plan that the file `recipe` names: beside it, or else the bundled one of this name, so
    that a copied recipe works.
    """
    own, shipped = recipe.parent / plan, _folder() / plan
    return shipped if _is_file(shipped) and not own.exists() else own


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a name that is too long
        return False


def description(path: Path) -> str:
    """The first line of a recipe's comment."""
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip()
