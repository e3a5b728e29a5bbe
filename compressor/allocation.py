"""Which linear becomes what, chosen after the calibration and before the first block.

Everything is compressed alike unless the recipe asks for ratios; an allocator (compressor/ratios/) then shares the same number
of zeros out among the linears.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from compressor.blocks import Progress
from compressor.calibration import States
from compressor.job import Job
from compressor.pattern import Pattern


def allocate(job: Job, states: States | None, device: torch.device, progress: Progress) -> Job:
    """The job with a goal of its own for every linear, where that was asked for; else the job as it is.

    Args:
        job: every linear with the same goal.
        states: calibration on entering block 0, left as it is; None where the job needs none.
        device: where blocks are computed.
        progress: told after each step.
    """
    if job.ratios:
        job = _share_zeros(job, states, device, progress)
    return job


def _share_zeros(job: Job, states: States | None, device: torch.device, progress: Progress) -> Job:
    assert job.ratios
    zeros = int(job.every[0].goal.sparsity * sum(task.linear.size for task in job.every))
    shares, facts = job.ratios.allocate(job, zeros, states, device, progress, **job.ratio_options)
    return replace(sharing(job, shares), allocation=facts)


def sharing(job: Job, shares: Mapping[str, int]) -> Job:
    """The job with so many zeros in each linear; one without any stays dense."""
    goals = {
        task.linear.name: Pattern.exact(count, task.linear.size) if (count := shares[task.linear.name]) else None
        for task in job.every
    }
    return job.assign(goals, "its share of the zeros is none")
