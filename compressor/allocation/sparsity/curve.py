"""Curves: every linear gets the sparsity at which one more zero costs the loss the same everywhere.

The rise of the loss is estimated for every linear at a grid of sparsities, with the masks and
updates of the run's own method (fisher.py; or measured, direct.py). Σ_l E_l(z_l) is minimised
subject to Σ_l z_l = zeros over the convex hulls of the curves (knapsack.py). The grid has a step of
5 %; a linear may end between two of its points.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch

from compressor.allocation.sparsity.direct import divergence_curves
from compressor.allocation.sparsity.fisher import error_curves
from compressor.allocation.sparsity.groups import ceiling, groups, inside
from compressor.allocation.sparsity.knapsack import share_out
from compressor.calibration.capture import States
from compressor.engine.plan import Plan
from compressor.engine.task import Task
from compressor.pattern import Pattern
from compressor.progress import Progress

NEEDS_INPUTS = True
_STEP = Fraction(1, 20)


def allocate(
    plan: Plan,
    zeros: int,
    states: States,
    device: torch.device,
    progress: Progress,
    *,
    granularity: str = "linear",
    max_sparsity: float = 0.0,
    tokens: int = 8192,
    labels: str = "text",
    direct: bool = False,
) -> tuple[dict[str, int], dict[str, Any]]:
    """Zeros by measured curves of the loss.

    Args:
        plan, zeros, states, device, progress: as compressor/allocation/sparsity/__init__.py says.
        granularity: `block` or `linear`.
        max_sparsity: of a group; 0 for 20 % more than the sparsity of the whole, 95 % at most.
        tokens: calibration tokens the curves are made from.
        labels: `text`, the tokens that follow; or `model`, drawn from its predictions.
        direct: measure the divergence with each linear compressed alone instead: many more forward
            passes, no labels.
    """
    grouped = groups(plan, granularity)
    weights = plan.weights
    most = ceiling(max_sparsity, zeros, weights, min(zeros / weights + 0.2, 0.95))
    grid = [step * _STEP for step in range(1, 20) if step * _STEP < most] + [most]

    def levels(task: Task) -> list[Pattern]:
        return [Pattern.exact(int(share * task.linear.size), task.linear.size) for share in grid]

    if direct:
        errors = divergence_curves(plan, levels, states, device, progress, tokens=tokens)
    else:
        errors = error_curves(
            plan, levels, states, device, progress, tokens=tokens, sampled=labels == "model"
        )
    sizes = [sum(linear.size for linear in linears) for linears in grouped.values()]
    curves = {
        name: [
            (0, 0.0),
            *zip(
                (int(share * size) for share in grid),
                _sums([errors[linear.name] for linear in linears]),
                strict=True,
            ),
        ]
        for (name, linears), size in zip(grouped.items(), sizes, strict=True)
    }
    shares = share_out(curves, zeros)
    return inside(grouped, [shares[name] for name in grouped]), {
        "sparsities": [float(share) for share in grid],
        "errors": errors,
    }


def _sums(rows: Sequence[Sequence[float]]) -> list[float]:
    return [sum(column) for column in zip(*rows, strict=True)]
