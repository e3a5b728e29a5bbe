"""A rehearsal on a tiny weight: what a method or a refinement refuses, it refuses before any
work.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch

from compressor.allocation.rank import Spectrum
from compressor.pattern import Pattern
from compressor.stats import InputStats


def rehearse(
    method: ModuleType,
    options: dict[str, Any],
    refine: ModuleType | None,
    refine_options: dict[str, Any],
    pattern: Pattern,
) -> None:
    """Run method and refinement on a tiny weight: what they refuse, they refuse now and not after
    the calibration.
    """
    columns = -(-16 // (pattern.m or 1)) * (pattern.m or 1)
    generator = torch.Generator().manual_seed(0)
    stats = InputStats(columns, gram=True, moments=True)
    stats.update(torch.randn(2 * columns, columns, generator=generator))
    weight = torch.randn(16, columns, generator=generator)
    pruned = method.compress(weight, stats, pattern, **options).dense()
    if refine:
        refine.refine(weight, pruned, stats, pattern, **refine_options)


def rehearse_rank(method: ModuleType, options: dict[str, Any]) -> None:
    """As `rehearse`, for a method that makes factors."""
    weight = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    stats = InputStats(16, gram=True)
    stats.update(weight)
    if method.NEEDS_GRADIENTS:
        method.decompose(weight, 4, stats.gram, weight @ weight.T, **options)
    else:
        method.compress(weight, stats, 4, **options)


def rehearse_ranks(ranks: ModuleType, options: dict[str, Any]) -> None:
    """Share all parameters of one large weight out, which is possible whatever the options, unless
    they are out of range.
    """
    size = 1 << 12
    spectrum = Spectrum((size, size), torch.linspace(1, 0, size, dtype=torch.float64))
    ranks.allocate({"weight": spectrum}, spectrum.size, **{**options, "align": 0})
