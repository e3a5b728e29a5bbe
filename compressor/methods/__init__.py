"""Methods: each a module with `compress(weight, stats, pattern, *, option=default, …) -> Form` and three constants.

    NEEDS_INPUTS   it wants statistics of the inputs
    NEEDS_GRAM     with the Gram matrix
    REFINABLE      its result is a plain pruned weight that a refinement may improve

The keyword-only parameters with defaults are the method's options. Adding a method: one file here, one name below.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from compressor.errors import UsageError, did_you_mean

METHODS = ["magnitude", "wanda", "nowag", "sparsegpt", "armor"]


def method_module(name: str) -> ModuleType:
    """The module of method `name`. Raises UsageError for an unknown name."""
    if name not in METHODS:
        raise UsageError(f"unknown method {name!r}; known: {', '.join(METHODS)}{did_you_mean(name, METHODS)}")
    return import_module(f"compressor.methods.{name}")
