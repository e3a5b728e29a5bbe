"""Which linear gets how many zeros, chosen after the calibration and before the first block.

With ratios, an allocator (compressor/allocation/sparsity/) shares the zeros of a sparsity out among
the linears; with a dense fraction, the linears that lose most under n:m stay dense. A plan made in
one of these ways is only taken if it is better than the plain one when both are tried on a part of
the calibration.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from compressor.allocation.choice import Choice
from compressor.allocation.guard import Trial, better
from compressor.allocation.sparsity import leave_dense, uniform
from compressor.calibration.capture import States
from compressor.engine.plan import LeaveDense, Plan, Prepared, ShareZeros
from compressor.pattern import Pattern
from compressor.progress import Progress


def share_zeros(
    plan: Plan,
    asked: ShareZeros,
    states: States | None,
    device: torch.device,
    prepared: Prepared,
    progress: Progress,
) -> Choice:
    """A sparsity of its own for every linear.

    Args:
        plan: every linear with the same target.
        asked: the allocator, and how many zeros in all.
        states: calibration on entering block 0, left as it is; None where the allocator needs none.
        device: where blocks are computed.
        prepared: what the run has ready for the blocks.
        progress: told after each step.
    """
    zeros = int(asked.sparsity * plan.weights)
    even = with_zeros(plan, uniform.uniform(plan, zeros))
    name = asked.allocator.__name__.rpartition(".")[2]
    total = {"by": name, "zeros": zeros}
    if asked.allocator is uniform:
        return Choice(even, total)
    assert states
    shares, facts = asked.allocator.allocate(plan, zeros, states, device, progress, **asked.options)
    plans = {"uniform": even, name: with_zeros(plan, shares)}
    return better(Trial(plan, states, device, prepared), plans, total | facts, progress)


def with_zeros(plan: Plan, shares: Mapping[str, int]) -> Plan:
    """The plan with so many zeros in each linear; one without any stays dense."""
    targets = {
        task.linear.name: Pattern.exact(count, task.linear.size)
        if (count := shares[task.linear.name])
        else None
        for task in plan.every
    }
    return plan.with_targets(targets, "its share of the zeros is none")


def leave_some_dense(
    plan: Plan,
    asked: LeaveDense,
    states: States,
    device: torch.device,
    prepared: Prepared,
    progress: Progress,
) -> Choice:
    """The plan as it is, or without the linears that lose most; arguments as for `share_zeros`."""
    kept, facts = leave_dense.select(
        plan, asked.fraction, states, device, progress, **asked.options
    )
    targets = {
        task.linear.name: None if task.linear.name in kept else task.target for task in plan.every
    }
    chosen = plan.with_targets(targets, "--dense-fraction")
    return better(
        Trial(plan, states, device, prepared),
        {"no linear dense": plan, "dense-fraction": chosen},
        {"by": "dense-fraction", "dense": sorted(kept), **facts},
        progress,
    )
