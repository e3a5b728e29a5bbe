"""Methods: each a module with `compress(weight, stats, pattern, *, option=default, …) -> Form` and three constants.

    NEEDS_INPUTS   it wants statistics of the inputs
    NEEDS_GRAM     with the Gram matrix
    REFINABLE      its result is a plain pruned weight that a refinement may improve

A method that makes thin factors takes a rank in place of the pattern and has, beside these,

    RANKS            name of the allocator (compressor/ranks/) that is its default
    NEEDS_GRADIENTS  `compress` takes the Gram matrix of the gradients at the outputs after the rank
    spectrum         singular values in its own metric, of the same arguments without the rank

The keyword-only parameters with defaults are the method's options. Adding a method: one file here, one name below.
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

from compressor.errors import UsageError, did_you_mean

METHODS = ["magnitude", "wanda", "nowag", "sparsegpt", "armor"]
FACTORIZATIONS = ["svd", "welore", "asvd", "svd_llm", "kfac"]


def method_module(name: str) -> ModuleType:
    """The module of method `name`. Raises UsageError for an unknown name."""
    known = METHODS + FACTORIZATIONS
    if name not in known:
        raise UsageError(f"unknown method {name!r}; known: {', '.join(known)}{did_you_mean(name, known)}")
    return import_module(f"compressor.methods.{name}")


def command(method: str) -> str:
    """The command that runs the method of this name."""
    return "lowrank" if method in FACTORIZATIONS else "prune"


def factors(method: ModuleType) -> bool:
    """Whether it makes thin factors of a rank, and does not prune to a pattern."""
    return hasattr(method, "RANKS")
