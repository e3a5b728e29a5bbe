"""What a run will do: one task for every linear, checked before any work and never changed.

What a run measures on the way (spectra, divergences, factors, free memory) is no part of it: see
`Choice` in compressor/allocation/choice.py and `Prepared` here. A run that chooses targets makes a
new plan, which has them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import cached_property
from types import ModuleType
from typing import Any

from compressor.checkpoint.reader import Reader
from compressor.engine.factor_store import Factored
from compressor.engine.task import Target, Task
from compressor.errors import UsageError
from compressor.methods import factors
from compressor.model.experts import only_stacks
from compressor.model.skeleton import Skeleton
from compressor.records.report import LeftDense
from compressor.stats import SAMPLE_TOKENS


@dataclass(frozen=True)
class ShareZeros:
    """Asked for: `allocator` (of compressor.allocation.sparsity) shares the zeros of `sparsity` out
    among the linears.
    """

    allocator: ModuleType
    sparsity: Fraction
    options: dict[str, Any]

    @property
    def measures(self) -> bool:
        """Whether targets depend on the calibration, whatever the method."""
        return self.allocator.NEEDS_INPUTS


@dataclass(frozen=True)
class LeaveDense:
    """Asked for: up to `fraction` of the weights stay dense under n:m, where that helps most."""

    fraction: Fraction
    options: dict[str, Any]
    measures = True


@dataclass(frozen=True)
class ShareRanks:
    """Asked for: `allocator` (of compressor.allocation.rank) gives every linear a rank, or leaves
    it dense; `keep` of the parameters remain.
    """

    keep: Fraction
    allocator: ModuleType
    options: dict[str, Any]
    measures = False

    @property
    def by_spectra(self) -> bool:
        """Whether ranks depend on more than the shapes."""
        return self.allocator.NEEDS_SPECTRA

    @property
    def align(self) -> int:
        """Ranks are multiples of it; 0 for the rule of `compressor.allocation.rank.step`."""
        return self.options.get("align", 0)


@dataclass(frozen=True)
class Prepared:
    """What a run has ready before it goes through the blocks.

    Attributes:
        factors: of the linears whose method needs gradients; None where there are none.
        gram_room: bytes that the Gram matrices of a block may take together; None for no limit.
    """

    factors: Factored | None = None
    gram_room: int | None = None


@dataclass(frozen=True)
class Plan:
    """What will be done, checked before any work. What is asked of all tasks is worked out once.

    Attributes:
        tasks: per block, the linears to compress and how.
        refine, refine_options: what improves each pruned weight; refine may be None.
        tune: epochs of block tuning, 0 for none.
        strengths: with which linears aim at the outputs of the dense model: none, one for all, or
            several that each chooses from.
        packed: store in a packed form what has one; else every weight is stored as `[out, in]`.
        all_tokens: experts are calibrated on all tokens, not only on those the router sends to
            them.
        seq_len: tokens of a calibration sample.
        seed: of the calibration and of everything random after it.
        held_out: further samples that nothing is fitted to, as a fraction of those of the
            calibration.
        left_dense: every other weight with two dimensions or more, and why.
        choice: what chooses the targets, or chose them; None where they were given.
    """

    reader: Reader
    skeleton: Skeleton
    tasks: tuple[tuple[Task, ...], ...]
    refine: ModuleType | None
    refine_options: dict[str, Any]
    tune: int
    packed: bool
    all_tokens: bool
    seq_len: int
    seed: int
    held_out: Fraction = Fraction(0)
    strengths: tuple[float, ...] = ()
    left_dense: list[LeftDense] = field(default_factory=list)
    choice: ShareZeros | LeaveDense | ShareRanks | None = None

    @cached_property
    def every(self) -> tuple[Task, ...]:
        """The tasks of all blocks."""
        return tuple(task for block in self.tasks for task in block)

    @cached_property
    def weights(self) -> int:
        """Numbers in all linears that have a task."""
        return sum(task.linear.size for task in self.every)

    @property
    def checked_options(self) -> dict[str, dict[str, Any]]:
        """The options of the recipe in their types, however they were given."""
        shared = self.choice.options if isinstance(self.choice, ShareZeros | LeaveDense) else {}
        return {
            "options": self.every[0].options,
            "refine_options": self.refine_options,
            "ratio_options": shared,
        }

    @property
    def notes(self) -> list[str]:
        """What a user should know of the checkpoint and of how it is compressed: a line each."""
        return [*self.reader.notes, *self.skeleton.notes]

    @cached_property
    def _methods(self) -> list[ModuleType]:
        """The methods of the tasks, each once."""
        return list({task.method.__name__: task.method for task in self.every}.values())

    @cached_property
    def needs_gradients(self) -> bool:
        """Whether a backward pass is needed."""
        return any(factors(method) and method.NEEDS_GRADIENTS for method in self._methods)

    @cached_property
    def measures(self) -> bool:
        """Whether targets are chosen by what is measured on the calibration."""
        if self.needs_gradients:
            return True
        if isinstance(self.choice, ShareRanks):
            return self.choice.by_spectra and any(method.NEEDS_INPUTS for method in self._methods)
        return self.choice is not None and self.choice.measures

    @cached_property
    def needs_inputs(self) -> bool:
        """Whether calibration is needed at all."""
        wanted = self.refine is not None or self.tune > 0 or self.measures
        return wanted or any(method.NEEDS_INPUTS for method in self._methods)

    @cached_property
    def needs_gram(self) -> bool:
        """Whether the statistics need the Gram matrix."""
        refined = self.refine is not None and self.refine.NEEDS_GRAM
        return refined or any(method.NEEDS_GRAM for method in self._methods)

    @property
    def keeps_dense(self) -> bool:
        """Whether hidden states of the dense model go through the blocks beside the others."""
        return self.tune > 0 or bool(self.strengths)

    @property
    def chooses_strength(self) -> bool:
        """Whether each linear chooses its strength by samples that are held out."""
        return len(self.strengths) > 1

    @property
    def needs_moments(self) -> bool:
        """Whether the statistics need mean and variance."""
        return self.refine is not None and self.refine.NEEDS_MOMENTS

    def further(self, samples: int) -> int:
        """How many samples are held out beside so many of the calibration: no more than are looked
        at, but where experts share their tokens.
        """
        asked = round(samples * self.held_out)
        if any(task.linear.experts for task in self.every):
            return asked
        return min(asked, -(-SAMPLE_TOKENS // self.seq_len))

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
        return self.packed and task.fits_2_4 and task.linear.experts not in self._unpackable

    @cached_property
    def _partial(self) -> set[str]:
        """Names of the modules of which some experts' matrices are tasks and others are not."""
        with_task = {task.linear.name for task in self.every}
        modules = {task.linear.experts for task in self.every} - {""}
        return {
            linear.experts
            for index in range(len(self.tasks) if modules else 0)
            for linear in self.skeleton.linears(index)
            if linear.experts in modules and linear.name not in with_task
        }

    @cached_property
    def _unpackable(self) -> set[str]:
        """Names of the modules whose experts are stored as plain weights: a loader needs all their
        matrices packed, or none.
        """
        stacks: dict[str, bool] = {}  # what a module holds is asked once, not for each expert

        def plain(task: Task) -> bool:
            if not (task.fits_2_4 or not task.method.REFINABLE):
                return True
            name = task.linear.experts
            if name not in stacks:
                stacks[name] = only_stacks(task.linear.module.owner)
            return not stacks[name]

        return self._partial | {
            task.linear.experts for task in self.every if task.linear.experts and plain(task)
        }

    def check_experts(self) -> Plan:
        """The plan itself. Raises UsageError where experts would have to be stored in a way that
        they cannot be.
        """
        for task in self.every if self.packed else ():
            name = task.linear.experts
            if not task.method.REFINABLE and name in self._unpackable:
                raise UsageError(
                    f"{name} has some experts that stay dense, or a norm: factors cannot be stored "
                    f"for {task.linear.name}; use a method that prunes, or leave them all dense "
                    f"with `ignore='*experts*'`"
                )
        return self

    def with_targets(self, targets: Mapping[str, Target | None], reason: str) -> Plan:
        """The plan with these targets, by linear name; a linear whose target is None stays dense,
        for `reason`.
        """
        left = [
            LeftDense(task.linear.name, list(task.linear.shape), reason)
            for task in self.every
            if targets[task.linear.name] is None
        ]
        tasks = tuple(
            tuple(
                task.with_target(target)
                for task in block
                if (target := targets[task.linear.name]) is not None
            )
            for block in self.tasks
        )
        return replace(self, tasks=tasks, left_dense=left + self.left_dense).check_experts()
