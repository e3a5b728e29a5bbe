"""Which linear gets which rank, chosen after the calibration and before the first block.

Spectra come from the weights alone where the method is blind to inputs, else from one pass of the
dense model, block by block. Ranks that were measured are only taken if they are better than uniform
ones of as many parameters when both are tried on a part of the calibration.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from compressor.allocation.guard import TOKENS, Trial, better
from compressor.allocation.rank import (
    Ranks,
    Spectrum,
    check_some,
    largest_rank,
    rounded_down,
    uniform,
)
from compressor.allocation.rank.fisher_factors import factor_all
from compressor.allocation.rank.measured import measured
from compressor.calibration.capture import States
from compressor.engine.blocks import dense_blocks
from compressor.engine.factor_store import Factored
from compressor.engine.task import Job, Task
from compressor.progress import Progress
from compressor.stats import InputStats

Spectra = dict[str, Spectrum]


def with_gradients(
    job: Job, states: States | None, device: torch.device, folder: Path, progress: Progress
) -> tuple[Factored | None, Spectra | None]:
    """What methods that need gradients make of their linears, spilled into `folder`, and the
    spectra that fell off.

    It is repeated where a run goes on: the pass is deterministic, and its factors are too large to
        keep twice.
    """
    if not job.needs_gradients:
        return None, None
    assert states
    return factor_all(
        job, states, device, Path(tempfile.mkdtemp(prefix="factors-", dir=folder)), progress
    )


def allocate(
    job: Job,
    states: States | None,
    spectra: Spectra | None,
    device: torch.device,
    progress: Progress,
) -> Job:
    """The job with a rank for every linear, or dense.

    Args:
        job: with `keep` and `ranks`.
        states: calibration on entering block 0, left as it is; None where the method is blind to
            inputs.
        spectra: if they are known already.
        device: where blocks are computed.
        progress: told after each step.

    Raises:
        UsageError: so few parameters cannot be kept, or so many that nothing is factored.
    """
    assert job.keep
    assert job.ranks
    shapes = {task.linear.name: Spectrum(task.linear.shape, torch.zeros(0)) for task in job.every}
    budget = int(job.keep * sum(spectrum.size for spectrum in shapes.values()))
    even = sharing(
        job,
        uniform.of_shapes(
            {name: each.shape for name, each in shapes.items()},
            job.keep,
            job.rank_options.get("align", 0),
        ),
    )
    name = job.ranks.__name__.rpartition(".")[2]
    facts: dict[str, Any] = {"by": name, "budget": budget}
    if job.ranks is uniform:
        return _counted(replace(even, allocation=facts), spectra or shapes)
    spectra = spectra or _spectra(job, states, device, progress)
    chosen = sharing(job, job.ranks.allocate(spectra, budget, **job.rank_options))
    if not job.measures:
        return _counted(replace(chosen, allocation=facts), spectra)
    assert states
    return _counted(
        better(Trial(job, states, device), {"uniform": even, name: chosen}, facts, progress),
        spectra,
    )


def sharing(job: Job, ranks: Ranks) -> Job:
    """The job with these ranks; a linear without one stays dense. Raises UsageError where no linear
    has one.
    """
    return job.assign(
        _whole(job, check_some(ranks, job.keep or Fraction(0))), "factors would not pay"
    )


def _whole(job: Job, ranks: Ranks) -> Ranks:
    """The ranks, with the largest that pays for matrices of experts that would stay dense beside
    others that do not.

    A loader needs all matrices of a module of experts in factors, or none. It costs no parameters,
    for factors are smaller.
    """
    factored = {task.linear.experts for task in job.every if ranks[task.linear.name]} - {""}
    most = {
        task.linear.name: rounded_down(
            largest_rank(task.linear.shape), task.linear.shape, job.rank_options.get("align", 0)
        )
        or None
        for task in job.every
        if task.linear.experts in factored and not ranks[task.linear.name]
    }
    return {name: rank or most.get(name) for name, rank in ranks.items()}


def _counted(job: Job, linears: Mapping[str, Spectrum]) -> Job:
    """With what is kept in `allocation`: parameters of the linears, and ranks (WeLore's effective
    rank reduction).

    Where spectra were measured, and not only shapes, they are kept as well.
    """
    goals = {task.linear.name: task.goal for task in job.every}
    ranks = {name: goal if isinstance(goal := goals.get(name), int) else None for name in linears}
    kept = sum(spectrum.parameters(ranks[name]) for name, spectrum in linears.items())
    full = {name: min(spectrum.shape) for name, spectrum in linears.items()}
    removed = sum(full[name] - rank for name, rank in ranks.items() if rank)
    numbers = {
        "parameters": kept,
        "dense_parameters": sum(spectrum.size for spectrum in linears.values()),
        "rank_reduction": removed / sum(full.values()),
    }
    known = {name: spectrum for name, spectrum in linears.items() if len(spectrum.values)}
    return replace(job, allocation={**job.allocation, **numbers}, spectra=measured(known, ranks))


def _spectra(job: Job, states: States | None, device: torch.device, progress: Progress) -> Spectra:
    """Singular values of every linear in its method's metric, of Frobenius norm 1: comparable
    without a backward pass.
    """
    spectra: Spectra = {}
    if not job.every[0].method.NEEDS_INPUTS:
        for done, task in enumerate(job.every):
            spectra[task.linear.name] = _spectrum(job, task, None, device)
            progress("spectra", done + 1, len(job.every))
        return spectra
    assert states
    for done, (tasks, stats) in enumerate(
        dense_blocks(job, states.at_least(TOKENS), device, gram=job.needs_gram)
    ):
        for task in tasks:
            spectra[task.linear.name] = _spectrum(job, task, stats[task.linear.name], device)
        progress("spectra", done + 1, len(job.tasks))
    return spectra


def _spectrum(job: Job, task: Task, stats: InputStats | None, device: torch.device) -> Spectrum:
    values = task.method.spectrum(task.linear.read(job.reader).to(device), stats, **task.options)
    return Spectrum(task.linear.shape, (values / values.norm().clamp_min(1e-300)).cpu())
