"""Uniform: every linear gets the same sparsity, the total exact to one weight. What the other
allocators have to beat.
"""

from __future__ import annotations

from typing import Any

import torch

from compressor.allocation.sparsity.apportion import evenly
from compressor.calibration.capture import States
from compressor.engine.plan import Plan
from compressor.progress import Progress

NEEDS_INPUTS = False


def allocate(
    plan: Plan, zeros: int, states: States | None, device: torch.device, progress: Progress
) -> tuple[dict[str, int], dict[str, Any]]:
    """In proportion to the number of weights. Nothing is measured."""
    return uniform(plan, zeros), {}


def uniform(plan: Plan, zeros: int) -> dict[str, int]:
    """Weights to prune in each linear, by name."""
    linears = [task.linear for task in plan.every]
    counts = evenly(zeros, [linear.size for linear in linears])
    return {linear.name: count for linear, count in zip(linears, counts, strict=True)}
