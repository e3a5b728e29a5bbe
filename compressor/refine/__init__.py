"""Refinements: what improves a pruned weight afterwards, at no extra bytes; one file each, the file
name is the option's value.

A refinement is a module: docstring with the paper, its URL and formula; `NEEDS_GRAM` and
`NEEDS_MOMENTS`, whether it reads the Gram matrix, or mean and variance; and a pure function
`refine(weight, pruned, stats, pattern, *, option=default, …) -> Tensor`. Its keyword-only
parameters are its options.

    weight   [out, in], the weight before pruning, storage dtype
    pruned   [out, in], same dtype: what a method made of it, zeros in place
    stats    the InputStats of the linear, with `gram` where NEEDS_GRAM, with `mean` and `m2` where
             NEEDS_MOMENTS
    returns  [out, in], same dtype, legal under `pattern`; neither argument is changed
"""

from __future__ import annotations

import importlib
from types import ModuleType

from compressor.errors import UsageError, did_you_mean

NAMES = ["dsnot", "lsq", "swap", "admm"]


def refinement(name: str) -> ModuleType:
    """The module of the refinement called `name`, imported on demand.

    Raises:
        UsageError: there is no refinement of that name.
    """
    if name not in NAMES:
        raise UsageError(
            f"unknown refinement {name!r}; known: {', '.join(NAMES)}{did_you_mean(name, NAMES)}"
        )
    return importlib.import_module(f"compressor.refine.{name}")
