"""Options of a method, a refinement or an allocator: the keyword-only parameters of its function
are what it has.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from compressor.errors import UsageError, did_you_mean


def check_options(
    owner: str, function: Callable[..., Any], options: Mapping[str, Any]
) -> dict[str, Any]:
    """`options` checked against the keyword-only parameters of `function`, text turned into their
    types.

    Raises:
        UsageError: unknown name or wrong type.
    """
    known = {
        name: parameter.default
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind is parameter.KEYWORD_ONLY
    }
    checked = {}
    for name, value in options.items():
        if name not in known:
            names = ", ".join(known) or "none"
            raise UsageError(
                f"{owner} has no option {name!r}; its options: "
                f"{names}{did_you_mean(name, list(known))}"
            )
        checked[name] = _typed(f"{owner} option {name}", value, known[name])
    return checked


def _typed(what: str, value: Any, default: Any) -> Any:
    """`value` in the type of `default`; numbers and booleans may be given as text."""
    kind = type(default)
    if kind is bool:
        truth = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
        if isinstance(value, str) and value.lower() in truth:
            return truth[value.lower()]
    elif (
        kind in (int, float)
        and not isinstance(value, bool)
        and isinstance(value, str | int | float)
    ):
        try:
            number = kind(value)
        except (ValueError, OverflowError):  # text that is no number; 10**400, infinity
            number = None
        if (
            number is not None
            and (isinstance(value, str) or number == value)
            and number - number == 0
        ):  # finite
            return number
    if type(value) is kind:
        return value
    raise UsageError(
        f"{what} is {value!r}; a value of type {kind.__name__} is expected, such as {default!r}"
    )
