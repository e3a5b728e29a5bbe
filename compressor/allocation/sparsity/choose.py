"""Which linear becomes what, chosen after the calibration and before the first block.

Everything is compressed alike unless the recipe asks for more. With ratios, an allocator
(compressor/allocation/sparsity/) shares the zeros of a sparsity out among the linears; with a dense
fraction, the linears that lose most under n:m stay dense. A plan made in one of these ways is only
taken if it is better than the plain one when both are tried on a part of the calibration.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from compressor.allocation.guard import Trial, better
from compressor.allocation.sparsity import leave_dense, uniform
from compressor.calibration.capture import States
from compressor.engine.task import Job
from compressor.pattern import Pattern
from compressor.progress import Progress


def allocate(job: Job, states: States | None, device: torch.device, progress: Progress) -> Job:
    """The job with a goal of its own for every linear, where that was asked for; else the job as it
    is.

    Args:
        job: every linear with the same goal.
        states: calibration on entering block 0, left as it is; None where the job needs none.
        device: where blocks are computed.
        progress: told after each step.
    """
    if job.ratios:
        return _share_zeros(job, states, device, progress)
    if job.dense_fraction:
        return _leave_dense(job, states, device, progress)
    return job


def _share_zeros(job: Job, states: States | None, device: torch.device, progress: Progress) -> Job:
    assert job.ratios
    goal = job.every[0].goal
    assert isinstance(goal, Pattern)
    zeros = int(goal.sparsity * sum(task.linear.size for task in job.every))
    even = sharing(job, uniform.uniform(job, zeros))
    name = job.ratios.__name__.rpartition(".")[2]
    if job.ratios is uniform:
        return replace(even, allocation={"by": name, "zeros": zeros})
    assert states
    shares, facts = job.ratios.allocate(job, zeros, states, device, progress, **job.ratio_options)
    facts = {"by": name, "zeros": zeros, **facts}
    return better(
        Trial(job, states, device), {"uniform": even, name: sharing(job, shares)}, facts, progress
    )


def sharing(job: Job, shares: Mapping[str, int]) -> Job:
    """The job with so many zeros in each linear; one without any stays dense."""
    goals = {
        task.linear.name: Pattern.exact(count, task.linear.size)
        if (count := shares[task.linear.name])
        else None
        for task in job.every
    }
    return job.assign(goals, "its share of the zeros is none")


def _leave_dense(job: Job, states: States | None, device: torch.device, progress: Progress) -> Job:
    assert states
    kept, facts = leave_dense.choose(
        job, job.dense_fraction, states, device, progress, **job.ratio_options
    )
    chosen = job.assign(
        {task.linear.name: None if task.linear.name in kept else task.goal for task in job.every},
        "--dense-fraction",
    )
    facts = {"by": "dense-fraction", "dense": sorted(kept), **facts}
    return better(
        Trial(job, states, device),
        {"no linear dense": job, "dense-fraction": chosen},
        facts,
        progress,
    )
