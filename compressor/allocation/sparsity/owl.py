"""OWL: blocks with more outliers keep more (Yin et al. 2024, https://arxiv.org/abs/2310.05175,
section 3.2).

With Wanda's score A_ij = |W_ij| · ‖X_j‖ on the inputs of the dense model, the outlier ratio of
block b is the share, over all its weights, of scores above M times their mean:

    D_b = mean [A_ij > M · mean(A)]          keep_b = 2λ (D_b - min D) / (max D - min D) + constant

so that the sparsities of the blocks span 2λ. The constant makes the total exact; the authors' makes
the mean over blocks exact, which is the same where blocks have one size.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from compressor.allocation.sparsity.apportion import apportion
from compressor.allocation.sparsity.groups import ceiling, groups, inside
from compressor.calibration.capture import States
from compressor.engine.blocks import dense_blocks
from compressor.engine.plan import Plan
from compressor.errors import UsageError
from compressor.progress import Progress

NEEDS_INPUTS = True


def allocate(
    plan: Plan,
    zeros: int,
    states: States,
    device: torch.device,
    progress: Progress,
    *,
    spread: float = 0.08,
    outlier: float = 5.0,
    max_sparsity: float = 0.0,
) -> tuple[dict[str, int], dict[str, Any]]:
    """Zeros by the outliers of each block.

    Args:
        plan, zeros, states, device, progress: as compressor/allocation/sparsity/__init__.py says.
        spread: λ; 0.08 in all of the authors' commands.
        outlier: M; 5 in all of them.
        max_sparsity: of a block; 0 for no limit but 1.
    """
    blocks = groups(plan, "block")
    sizes = [sum(linear.size for linear in linears) for linears in blocks.values()]
    ratios = _outlier_ratios(plan, states, device, progress, outlier)
    low, high = min(ratios), max(ratios)
    kept = [
        Fraction(2 * spread * (ratio - low) / (high - low) if high > low else 0) for ratio in ratios
    ]
    counts = shifted(sizes, kept, zeros, ceiling(max_sparsity, zeros, sum(sizes), 1.0))
    return inside(blocks, counts), {"outliers": dict(zip(blocks, ratios, strict=True))}


def shifted(
    sizes: Sequence[int], kept: Sequence[Fraction], zeros: int, most: Fraction
) -> list[int]:
    """Zeros of each group: sparsity t - kept_g, cut to [0, most], with the t that makes them
    `zeros` in all.
    """

    def shares(t: Fraction) -> list[Fraction]:
        return [
            size * min(max(t - keep, Fraction(0)), most)
            for size, keep in zip(sizes, kept, strict=True)
        ]

    for low, high in pairwise(sorted({point for keep in kept for point in (keep, keep + most)})):
        start, stop = sum(shares(low)), sum(shares(high))
        if start <= zeros <= stop and start < stop:
            return apportion(
                zeros, shares(low + (high - low) * (zeros - start) / (stop - start)), sizes
            )
    raise UsageError(f"max_sparsity {float(most):g} is below the sparsity asked for")


def _outlier_ratios(
    plan: Plan, states: States, device: torch.device, progress: Progress, outlier: float
) -> list[float]:
    """D of every block that has linears to prune, from the dense model."""
    found = []
    for done, (tasks, stats) in enumerate(dense_blocks(plan, states, device)):
        scores = [task.linear.get().abs().float() * stats[task.linear.name].norm for task in tasks]
        if scores:
            found.append(_share_above(scores, outlier))
        progress("outliers", done + 1, len(plan.tasks))
    return found


def _share_above(scores: list[Tensor], outlier: float) -> float:
    """Share of all scores above `outlier` times their mean."""
    count = sum(score.numel() for score in scores)
    mean = sum(score.sum(dtype=torch.float64).item() for score in scores) / count
    return sum(int((score > outlier * mean).sum()) for score in scores) / count
