"""What Python hands to the functions of the package beside settings, each in the type it has or one
line of error; and their signatures and help, completed from the table of settings.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

from compressor.config.recipe import SETTINGS, said
from compressor.errors import UsageError
from compressor.text import home_path

Function = TypeVar("Function", bound=Callable[..., Any])


def as_path(name: str, value: Any) -> Path:
    """A path, where a text or a path was given. Raises UsageError."""
    if not isinstance(value, str | PathLike):
        raise UsageError(f"`{name}` is {value!r}; a text or a path is expected")
    return home_path(value)


def as_text(name: str, value: Any) -> str:
    """A text or a path as text. Raises UsageError."""
    return value if isinstance(value, str) else str(as_path(name, value))


def as_texts(name: str, value: Any) -> list[str]:
    """Texts; one alone is the only element, None is none. Raises UsageError."""
    if value is None:
        return []
    if isinstance(value, str | PathLike):
        return [as_text(name, value)]
    if not isinstance(value, Iterable):
        raise UsageError(f"`{name}` is {value!r}; a text or a list of texts is expected")
    return [as_text(name, each) for each in value]


def check_kinds(kind: type | tuple[type, ...], **values: Any) -> None:
    """Raise UsageError for a value that is not of `kind`; True and False are no numbers."""
    kinds = kind if isinstance(kind, tuple) else (kind,)
    for name, value in values.items():
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            expected = " or ".join(each.__name__ for each in kinds if each is not type(None))
            raise UsageError(f"`{name}` is {value!r}; a value of type {expected} is expected")


def check_something_to_score(datasets: Sequence[str], tasks: Sequence[str]) -> None:
    """Raise UsageError where there is nothing."""
    if not datasets and not tasks:
        raise UsageError(
            "give something to score: `dataset` (perplexity), `tasks` (lm-eval), or both"
        )


def with_settings(command: str, kinds: type) -> Callable[[Function], Function]:
    """The function's signature shows the settings of `command`, which are the keys of the typed
    dictionary `kinds`, in place of its `**settings`; its docstring says what each is.
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function)
        own = [
            parameter
            for parameter in signature.parameters.values()
            if parameter.kind is not parameter.VAR_KEYWORD
        ]
        settings = [
            inspect.Parameter(
                name,
                inspect.Parameter.KEYWORD_ONLY,
                default=None,
                annotation=_annotation(kinds, name),
            )
            for name in SETTINGS[command]
        ]
        function.__signature__ = signature.replace(parameters=[*own, *settings])  # type: ignore[attr-defined]  # what inspect reads first
        lines = "\n".join(f"        {_said(command, name)}" for name in SETTINGS[command])
        function.__doc__ = (function.__doc__ or "").replace("        settings:", lines, 1)
        return function

    return decorate


def _annotation(kinds: type, name: str) -> str:
    annotation = kinds.__annotations__[name]
    return getattr(annotation, "__forward_arg__", str(annotation))


def _said(command: str, name: str) -> str:
    text, default = said(name, command)
    shown = f" Default: {default}." if default else ""
    return f"{name}: {text}{shown}"
