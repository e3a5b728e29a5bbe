"""What a run will do with every linear."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from types import ModuleType
from typing import Any

from compressor.checkpoint.reader import Reader
from compressor.engine.factor_store import Factored
from compressor.errors import UsageError
from compressor.methods import counterpart, factors, method_module
from compressor.model.experts import only_stacks
from compressor.model.skeleton import Linear, Skeleton
from compressor.pattern import Pattern
from compressor.records.report import LeftDense


@dataclass(frozen=True)
class Task:
    """What one linear is to become: `method.compress(weight, stats, goal, **options)`, refined or
    not by the job's refinement.

    The goal is a pattern, or the rank of factors.
    """

    linear: Linear
    method: ModuleType
    options: dict[str, Any]
    goal: Pattern | int
    refined: bool = True

    @property
    def removed(self) -> float:
        """Fraction of the weight's numbers that go: zeros of a pattern, or what factors of a rank
        do without.
        """
        if isinstance(self.goal, Pattern):
            return float(self.goal.sparsity)
        return 1 - self.goal * sum(self.linear.shape) / self.linear.size

    @property
    def needs_gradients(self) -> bool:
        """Whether the linear is factored in a backward pass."""
        return factors(self.method) and self.method.NEEDS_GRADIENTS


@dataclass(frozen=True)
class Job:
    """What will be done, checked before any work.

    Attributes:
        tasks: per block, the linears to compress and how.
        refine, refine_options: what improves each pruned weight; refine may be None.
        tune: epochs of block tuning, 0 for none.
        packed: store in a packed form what has one.
        all_tokens: experts are calibrated on all tokens, not only on those the router sends to
            them.
        seq_len: tokens of a calibration sample.
        seed: of the calibration and of everything random after it.
        left_dense: every other weight with two dimensions or more, and why.
        ratios: what gives every linear a number of zeros of its own; may be None.
        dense_fraction: of the weights, may stay dense where that helps most.
        ratio_options: of either.
        allocation: what that measured; empty before it ran.
        spectra: what ranks were chosen from, as the report keeps it.
        keep: of the parameters of the linears; None where goals are patterns or of a plan. Until
            ranks are chosen, goals are 1.
        ranks, rank_options: what gives every linear a rank; None without `keep`.
        factored: what methods that need gradients made of their linears, once that is done.
        gram_room: bytes that the Gram matrices of a block may take together; None for as many as
            there are.
    """

    reader: Reader
    skeleton: Skeleton
    tasks: list[list[Task]]
    refine: ModuleType | None
    refine_options: dict[str, Any]
    tune: int
    packed: bool
    all_tokens: bool
    seq_len: int
    seed: int
    left_dense: list[LeftDense]
    ratios: ModuleType | None = None
    dense_fraction: Fraction = Fraction(0)
    ratio_options: dict[str, Any] = field(default_factory=dict)
    allocation: dict[str, Any] = field(default_factory=dict)
    spectra: list[dict[str, Any]] = field(default_factory=list)
    keep: Fraction | None = None
    ranks: ModuleType | None = None
    rank_options: dict[str, Any] = field(default_factory=dict)
    factored: Factored | None = None
    gram_room: int | None = None

    @property
    def every(self) -> list[Task]:
        """The tasks of all blocks."""
        return [task for block in self.tasks for task in block]

    @property
    def checked_options(self) -> dict[str, dict[str, Any]]:
        """The options of the recipe in their types, however they were given."""
        return {
            "options": self.every[0].options,
            "refine_options": self.refine_options,
            "ratio_options": self.ratio_options,
        }

    @property
    def needs_inputs(self) -> bool:
        """Whether calibration is needed at all."""
        asked = self.refine is not None or self.tune > 0 or self.measures
        return asked or any(task.method.NEEDS_INPUTS for task in self.every)

    @property
    def measures(self) -> bool:
        """Whether goals are chosen by what is measured on the calibration."""
        ratios = self.ratios is not None and self.ratios.NEEDS_INPUTS
        ranks = self.shares_by_spectra and any(task.method.NEEDS_INPUTS for task in self.every)
        return self.dense_fraction > 0 or ratios or ranks or self.needs_gradients

    @property
    def shares_by_spectra(self) -> bool:
        """Whether ranks depend on more than the shapes."""
        return self.ranks is not None and not self.ranks.__name__.endswith(".uniform")

    @property
    def needs_gradients(self) -> bool:
        """Whether a backward pass is needed."""
        return any(task.needs_gradients for task in self.every)

    @property
    def needs_gram(self) -> bool:
        """Whether the statistics need the Gram matrix."""
        return any(task.method.NEEDS_GRAM for task in self.every) or (
            self.refine is not None and self.refine.NEEDS_GRAM
        )

    @property
    def splits_batches(self) -> bool:
        """Whether processes that share the run each take a part of the calibration; else each takes
        all of it.

        Gram matrices are built by one process each, in the order of the batches: sums of sums have
            other bits.
        """
        return not (self.needs_gram or self.measures)

    def packs(self, task: Task) -> bool:
        """Whether the pruned weight of a task is stored packed."""
        return self.packed and self.fits_2_4(task) and task.linear.experts not in self._unpackable

    @staticmethod
    def fits_2_4(task: Task) -> bool:
        """Whether the pruned weight of a task could be stored packed."""
        return isinstance(task.goal, Pattern) and task.goal.fits_2_4

    @cached_property
    def _partial(self) -> set[str]:
        """Names of the modules of which some experts' matrices are tasks and others are not."""
        tasks = {task.linear.name for task in self.every}
        chosen = {task.linear.experts for task in self.every} - {""}
        return {
            linear.experts
            for linear in self._linears
            if linear.experts in chosen and linear.name not in tasks
        }

    @cached_property
    def _unpackable(self) -> set[str]:
        """Names of the modules whose experts are stored as plain weights: a loader needs all their
        matrices packed, or none.
        """

        def plain(task: Task) -> bool:
            form = self.fits_2_4(task) or not task.method.REFINABLE
            return (
                not form or task.linear.at is not None or not only_stacks(task.linear.module.owner)
            )

        return self._partial | {
            task.linear.experts for task in self.every if task.linear.experts and plain(task)
        }

    @property
    def _linears(self) -> list[Linear]:
        return [
            linear for index in range(len(self.tasks)) for linear in self.skeleton.linears(index)
        ]

    def check_experts(self) -> Job:
        """The job itself. Raises UsageError where experts would have to be stored in a way that
        they cannot be.
        """
        for task in self.every:
            name = task.linear.experts
            if not task.method.REFINABLE and name in self._unpackable:
                shared = task.linear.at is not None
                why = (
                    "keeps all experts in one tensor"
                    if shared
                    else "has some experts that stay dense, or biases"
                )
                glob = f"*{task.linear.name.split('.')[-2]}.*" if shared else "*experts*"
                raise UsageError(
                    f"{name} {why}: factors cannot be stored for {task.linear.name}; "
                    f"use a method that prunes, or leave them all dense with --ignore '{glob}'"
                )
        return self

    def assign(self, goals: Mapping[str, Pattern | int | None], reason: str) -> Job:
        """The job with these goals, by linear name; a linear whose goal is None stays dense, for
        `reason`.
        """
        left = [
            LeftDense(task.linear.name, list(task.linear.shape), reason)
            for task in self.every
            if goals[task.linear.name] is None
        ]
        tasks = [
            [_suited(task, goal) for task in block if (goal := goals[task.linear.name]) is not None]
            for block in self.tasks
        ]
        return replace(self, tasks=tasks, left_dense=left + self.left_dense).check_experts()


def _suited(task: Task, goal: Pattern | int) -> Task:
    """The task with this goal, and with a method that can meet it."""
    ranked = isinstance(goal, int)
    if factors(task.method) == ranked:
        return replace(task, goal=goal)
    other = counterpart(task.method.__name__.rpartition(".")[2])
    return replace(task, goal=goal, method=method_module(other), options={}, refined=not ranked)
