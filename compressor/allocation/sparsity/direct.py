"""How far the predictions really move when one linear is compressed: KL(dense ‖ changed), linear by
linear and level by level.

The slow, exact twin of fisher.py: no second order, no gradients, forward passes only, and for every
linear and level a pass through the blocks after it (what is before it has not changed). Two blocks
are in memory.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from compressor.allocation.sparsity.fisher import Levels
from compressor.calibration import capture
from compressor.calibration.capture import States
from compressor.calibration.float32 import in_float32
from compressor.calibration.head import divergence, head
from compressor.calibration.hidden_states import Batch, Batches, advance
from compressor.engine.plan import Plan
from compressor.model.skeleton import Skeleton
from compressor.progress import Progress
from compressor.stats import InputStats, collecting


@torch.no_grad()
def divergence_curves(
    plan: Plan,
    levels: Levels,
    states: States,
    device: torch.device,
    progress: Progress,
    *,
    tokens: int,
) -> dict[str, list[float]]:
    """Divergence, nats a token, for every linear and each of its levels; arguments as for
    `fisher.error_curves`.
    """
    skeleton, part = in_float32(plan.skeleton, states, tokens, device)
    exact, hidden, curves = part.entering(), part.entering(), {}
    _through_rest(skeleton, part, [exact], 0, device)
    for index, tasks in enumerate(plan.tasks):
        block, arguments = skeleton.load_block(index, device), part.arguments[index]
        linears = {linear.name: linear for linear in skeleton.linears(index)}
        modules = {task.linear.name: linears[task.linear.name].module for task in tasks}
        with collecting(modules, gram=any(task.method.NEEDS_GRAM for task in tasks)) as stats:
            leaving = part.room()
            for batch in hidden:
                leaving.append(capture.run(block, batch, arguments))
        for task in tasks:
            stats.get(task.linear.name, InputStats(1)).check(task.linear.name)
            linear, weight = linears[task.linear.name], task.linear.read(plan.reader).to(device)
            variants: list[list[Batch] | Batches] = []
            for goal in levels(task):
                linear.set(
                    task.method.compress(weight, stats[linear.name], goal, **task.options).dense()
                )
                variants.append(part.room())
                for batch in hidden:
                    variants[-1].append(capture.run(block, batch, arguments))
            linear.set(weight)
            _through_rest(skeleton, part, variants, index + 1, device)
            with head(skeleton, part, device) as logits:
                curves[linear.name] = [divergence(logits, exact, variant) for variant in variants]
        skeleton.free_block(index)
        hidden = leaving
        progress("divergence curves", index + 1, len(plan.tasks))
    return curves


def _through_rest(
    skeleton: Skeleton,
    states: States,
    variants: Sequence[list[Batch] | Batches],
    start: int,
    device: torch.device,
) -> None:
    """Take each variant, batches that enter block `start`, through it and the blocks after it."""
    for index in range(start, len(skeleton.blocks)):
        block = skeleton.load_block(index, device)
        for variant in variants:
            advance(variant, capture.through(block, states.arguments[index]))
        skeleton.free_block(index)
