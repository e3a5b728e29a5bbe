"""Methods: each a module with `compress(weight, stats, pattern, *, option=default, …) -> Form` and
three constants.

    NEEDS_INPUTS   it wants statistics of the inputs
    NEEDS_GRAM     with the Gram matrix
    REFINABLE      its result is a plain pruned weight that a refinement may improve

A method that makes thin factors takes a rank in place of the pattern and has, beside these,

    RANKS            name of the allocator (compressor/allocation/rank/) that is its default
    NEEDS_GRADIENTS  False
    spectrum         singular values in its own metric, of the same arguments without the rank

or, where it sees gradients, NEEDS_GRADIENTS = True and, in place of `compress` and `spectrum`,

    decompose(weight, rank, inputs, outputs, *, option=default, …) -> factors and singular values,
    of the two Kronecker factors of
                     compressor/allocation/rank/fisher_factors.py

The keyword-only parameters with defaults are the method's options. Adding a method: one file here,
one name below.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any

from compressor.errors import UsageError, did_you_mean

METHODS = [
    "magnitude",
    "wanda",
    "nowag",
    "sparsegpt",
    "armor",
]
FACTORIZATIONS = ["svd", "welore", "asvd", "svd_llm", "fisher"]
DEFAULT_FACTORIZATION = "fisher"
_OLD_NAMES = {"kfac": "fisher"}


def current_name(name: str) -> str:
    """What the method is called today that a recipe or a report calls `name`."""
    return _OLD_NAMES.get(name, name)


def method_module(name: str) -> ModuleType:
    """The module of method `name`, or of an old name. Raises UsageError for an unknown one."""
    name = current_name(name)
    known = METHODS + FACTORIZATIONS
    if name not in known:
        raise UsageError(
            f"unknown method {name!r}; known: {', '.join(known)}{did_you_mean(name, known)}"
        )
    return import_module(f"compressor.methods.{name}")


def options_of(method: ModuleType) -> Callable[..., Any]:
    """The function whose keyword-only parameters are the options of `method`."""
    return method.decompose if factors(method) and method.NEEDS_GRADIENTS else method.compress


def command(method: str) -> str:
    """The command that runs the method of this name."""
    return "lowrank" if current_name(method) in FACTORIZATIONS else "prune"


def counterpart(method: str) -> str:
    """What does the other half of a plan that mixes forms: factors beside a method that prunes,
    zeros beside one that factors.
    """
    return "sparsegpt" if current_name(method) in FACTORIZATIONS else "svd_llm"


def factors(method: ModuleType) -> bool:
    """Whether it makes thin factors of a rank, and does not prune to a pattern."""
    return hasattr(method, "RANKS")
