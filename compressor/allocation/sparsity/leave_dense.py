"""Which linears stay dense under n:m: those whose pruning costs the loss most for their size.

n:m leaves no ratio to choose, but a linear may be left out. The rise of the loss that pruning each
linear would cause is estimated as for `curve` (fisher.py); the set with the largest sum that fits
into the fraction of all weights that may stay dense is found exactly (0/1 knapsack, knapsack.py).
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import torch

from compressor.allocation.sparsity import knapsack
from compressor.allocation.sparsity.fisher import error_curves
from compressor.calibration.capture import States
from compressor.engine.plan import Plan
from compressor.progress import Progress


def select(
    plan: Plan,
    fraction: Fraction,
    states: States,
    device: torch.device,
    progress: Progress,
    *,
    tokens: int = 8192,
    labels: str = "text",
) -> tuple[set[str], dict[str, Any]]:
    """Names of the linears that stay dense.

    Args:
        plan: every linear with the same n:m target.
        fraction: of the weights of its linears, at most.
        states: calibration on entering block 0, left as it is.
        device: where blocks are computed.
        progress: told of every block.
        tokens: calibration tokens the errors are measured on.
        labels: `text` or `model`, as for `curve`.
    """
    errors = error_curves(
        plan,
        lambda task: [task.chosen],
        states,
        device,
        progress,
        tokens=tokens,
        sampled=labels == "model",
    )
    values = {name: curve[0] for name, curve in errors.items()}
    sizes = {task.linear.name: task.linear.size for task in plan.every}
    return knapsack.best_set(values, sizes, int(fraction * sum(sizes.values()))), {"errors": values}
