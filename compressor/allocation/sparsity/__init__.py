"""Ratios: how many of the zeros each linear gets; one file per allocator, the file name is the
option's value.

An allocator is a module: docstring with the paper, its URL and formula; `NEEDS_INPUTS`, whether it
needs calibration; and a function `allocate(plan, zeros, states, device, progress, *,
option=default, …) -> (shares, facts)`, whose keyword-only parameters are its options.

    plan       the plan with the same goal for every linear
    zeros     weights to prune in all its linears together
    states    calibration on entering block 0, left as it is; None where NEEDS_INPUTS is false
    shares    weights to prune in each linear, by name; `zeros` in all
    facts     what it measured, for the report
"""

from __future__ import annotations

import importlib
from types import ModuleType

from compressor.errors import UsageError, did_you_mean

ALLOCATORS = ["uniform", "ecoflap", "owl", "curve"]


def allocator(name: str) -> ModuleType:
    """The module of the allocator called `name`. Raises UsageError for an unknown name."""
    if name not in ALLOCATORS:
        raise UsageError(
            f"unknown ratios {name!r}; known: "
            f"{', '.join(ALLOCATORS)}{did_you_mean(name, ALLOCATORS)}"
        )
    return importlib.import_module(f"compressor.allocation.sparsity.{name}")
