"""Pruned weights that the tests of refinements share."""

import torch

from compressor.pattern import Pattern
from compressor.stats import InputStats


def case(seed, rows, columns, tokens, pattern, dtype=torch.float32, dead=0):
    """A weight, a Wanda-pruned copy and the statistics of correlated inputs."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(columns, columns, generator=generator) / columns**0.5
    x = (
        torch.randn(tokens, columns, generator=generator) @ mix
        + torch.randn(columns, generator=generator) * 0.3
    )
    x[:, :dead] = 0
    stats = InputStats(columns, gram=True, moments=True)
    stats.update(x)
    weight = torch.randn(rows, columns, generator=generator).to(dtype)
    parsed = Pattern.parse(pattern)
    return weight, weight * parsed.mask(weight.float().abs() * stats.norm), stats, parsed


def errors(weight, pruned, stats):
    """‖X(w - ŵ)ᵀ‖² of every row in float64."""
    difference = weight.double() - pruned.double()
    return torch.linalg.vecdot(difference @ stats.gram.double(), difference)
