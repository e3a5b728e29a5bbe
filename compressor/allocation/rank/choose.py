"""Which linear gets which rank, chosen after the calibration and before the first block.

Spectra come from the weights alone where the method is blind to inputs, else from one pass of the
dense model, block by block. Ranks that were measured are only taken if they are better than uniform
ones of as many parameters when both are tried on a part of the calibration.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from compressor.allocation.choice import Choice
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
from compressor.engine.plan import Plan, Prepared, ShareRanks
from compressor.engine.task import Rank, Task
from compressor.errors import NumericalError
from compressor.progress import Progress
from compressor.stats import InputStats

Spectra = dict[str, Spectrum]


def factored_by_gradients(
    plan: Plan,
    states: States | None,
    device: torch.device,
    folder: Path,
    progress: Progress,
    once: Callable[[str, Callable[[], Any]], Any] = lambda _, make: make(),
) -> Factored | None:
    """The factors, in `folder`, of the linears whose method needs gradients, with their singular
    values; None where there are none.

    Args:
        plan, states, device, progress: as for `share_ranks`.
        folder: that exists.
        once: gives what a function makes, or what it gave an earlier run: its factors are there
            then.
    """
    if not plan.needs_gradients:
        return None
    factors = Factored(folder)

    def make() -> dict[str, str]:
        assert states
        factor_all(plan, states, device, factors, progress)
        return factors.sums()

    sums = once("factors", make)
    if not factors.values:
        factors.load(sums)
    return factors


def share_ranks(
    plan: Plan,
    asked: ShareRanks,
    states: States | None,
    device: torch.device,
    prepared: Prepared,
    progress: Progress,
) -> Choice:
    """A rank for every linear, or dense.

    Args:
        plan: no linear has a target.
        asked: the allocator, and what part of the parameters to keep.
        states: calibration on entering block 0, left as it is; None where the method is blind to
            inputs.
        device: where blocks are computed.
        prepared: what the run has ready for the blocks; spectra are those of its factors, if it has
            them.
        progress: told after each step.

    Raises:
        UsageError: so few parameters cannot be kept, or so many that nothing is factored.
    """
    shapes = {task.linear.name: Spectrum(task.linear.shape, torch.zeros(0)) for task in plan.every}
    even = with_ranks(
        plan,
        asked,
        uniform.of_shapes(
            {name: each.shape for name, each in shapes.items()}, asked.keep, asked.align
        ),
    )
    budget = int(asked.keep * plan.weights)
    name = asked.allocator.__name__.rpartition(".")[2]
    total: dict[str, Any] = {"by": name, "budget": budget}
    values = prepared.factors.values if prepared.factors else {}
    spectra = {
        name: Spectrum(shapes[name].shape, values[name]) for name in shapes if name in values
    }
    if not asked.by_spectra:
        return _counted(Choice(even, total), spectra or shapes)
    spectra = spectra or _spectra(plan, states, device, progress)
    chosen = with_ranks(plan, asked, asked.allocator.allocate(spectra, budget, **asked.options))
    if not plan.measures:
        return _counted(Choice(chosen, total), spectra)
    assert states
    trial = Trial(plan, states, device, prepared)
    return _counted(better(trial, {"uniform": even, name: chosen}, total, progress), spectra)


def with_ranks(plan: Plan, asked: ShareRanks, ranks: Ranks) -> Plan:
    """The plan with these ranks; a linear without one stays dense. Raises UsageError where no
    linear has one.
    """
    whole = _whole(plan, check_some(ranks, asked.keep), asked.align)
    targets = {name: Rank(rank) if rank else None for name, rank in whole.items()}
    return plan.with_targets(targets, "factors would not pay")


def _whole(plan: Plan, ranks: Ranks, align: int) -> Ranks:
    """The ranks, with the largest that pays for matrices of experts that would stay dense beside
    others that do not.

    A loader needs all matrices of a module of experts in factors, or none. It costs no parameters,
    for factors are smaller.
    """
    factored = {task.linear.experts for task in plan.every if ranks[task.linear.name]} - {""}
    most = {
        task.linear.name: rounded_down(largest_rank(task.linear.shape), task.linear.shape, align)
        or None
        for task in plan.every
        if task.linear.experts in factored and not ranks[task.linear.name]
    }
    return {name: rank or most.get(name) for name, rank in ranks.items()}


def _counted(choice: Choice, linears: Mapping[str, Spectrum]) -> Choice:
    """With what is kept: parameters of the linears, and ranks (WeLore's effective rank reduction).

    Where spectra were measured, and not only shapes, they are kept as well.
    """
    targets = {task.linear.name: task.target for task in choice.plan.every}
    ranks: Ranks = {
        name: target if isinstance(target := targets.get(name), Rank) else None for name in linears
    }
    full = {name: min(spectrum.shape) for name, spectrum in linears.items()}
    numbers = {
        "parameters": sum(spectrum.parameters(ranks[name]) for name, spectrum in linears.items()),
        "dense_parameters": sum(spectrum.size for spectrum in linears.values()),
        "rank_reduction": sum(full[name] - rank for name, rank in ranks.items() if rank)
        / sum(full.values()),
    }
    known = {name: spectrum for name, spectrum in linears.items() if len(spectrum.values)}
    return replace(choice, measured={**choice.measured, **numbers}, spectra=measured(known, ranks))


def _spectra(
    plan: Plan, states: States | None, device: torch.device, progress: Progress
) -> Spectra:
    """Singular values of every linear in its method's metric, of Frobenius norm 1: comparable
    without a backward pass.
    """
    spectra: Spectra = {}
    if not plan.every[0].method.NEEDS_INPUTS:
        for done, task in enumerate(plan.every):
            spectra[task.linear.name] = _spectrum(plan, task, None, device)
            progress("spectra", done + 1, len(plan.every))
        return spectra
    assert states
    for done, (tasks, stats) in enumerate(
        dense_blocks(plan, states.at_least(TOKENS), device, gram=plan.needs_gram)
    ):
        for task in tasks:
            spectra[task.linear.name] = _spectrum(plan, task, stats[task.linear.name], device)
        progress("spectra", done + 1, len(plan.tasks))
    return spectra


def _spectrum(plan: Plan, task: Task, stats: InputStats | None, device: torch.device) -> Spectrum:
    values = task.method.spectrum(task.linear.read(plan.reader).to(device), stats, **task.options)
    values = (values / values.norm().clamp_min(1e-300)).cpu()
    if not bool(torch.isfinite(values).all()):
        raise NumericalError(f"{task.linear.name}: its singular values are not finite")
    return Spectrum(task.linear.shape, values)
