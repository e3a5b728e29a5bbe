"""Methods: each a module with `NEEDS_INPUTS`, `NEEDS_GRAM` and `compress(weight, stats, pattern, *, option=default, …) -> Form`.

The keyword-only parameters with defaults are the method's options. Adding a method: one file here, one name below.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from compressor.errors import UsageError, did_you_mean

METHODS = ["magnitude", "wanda", "sparsegpt"]


def method_module(name: str) -> ModuleType:
    """The module of method `name`. Raises UsageError for an unknown name."""
    if name not in METHODS:
        raise UsageError(f"unknown method {name!r}; known: {', '.join(METHODS)}{did_you_mean(name, METHODS)}")
    return import_module(f"compressor.methods.{name}")
