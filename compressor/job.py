"""What a run will do, checked before any work: names, options, output, pattern against every linear, dataset, lengths."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch

from compressor import data, plan
from compressor.checkpoint import Reader, resolve
from compressor.errors import CheckpointError, UsageError
from compressor.experts import only_stacks
from compressor.methods import counterpart, factors, method_module, options_of
from compressor.model import WEIGHT_DTYPES, Linear, Skeleton
from compressor.pattern import Pattern, parse_fraction
from compressor.ranks import allocator as rank_allocator
from compressor.ranks import check_align, uniform
from compressor.ratios import allocator
from compressor.ratios.options import check as check_ratio_options
from compressor.recipe import Recipe, check_options
from compressor.refine import refinement
from compressor.rehearsal import rehearse, rehearse_rank, rehearse_ranks
from compressor.report import LeftDense
from compressor.writer import check_output

if TYPE_CHECKING:
    from compressor.curvature import Factored


@dataclass(frozen=True)
class Task:
    """What one linear is to become: `method.compress(weight, stats, goal, **options)`, refined or not by the job's refinement.

    The goal is a pattern, or the rank of factors.
    """

    linear: Linear
    method: ModuleType
    options: dict[str, Any]
    goal: Pattern | int
    refined: bool = True

    @property
    def removed(self) -> float:
        """Fraction of the weight's numbers that go: zeros of a pattern, or what factors of a rank do without."""
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
        all_tokens: experts are calibrated on all tokens, not only on those the router sends to them.
        seq_len: tokens of a calibration sample.
        seed: of the calibration and of everything random after it.
        left_dense: every other weight with two dimensions or more, and why.
        ratios: what gives every linear a number of zeros of its own; may be None.
        dense_fraction: of the weights, may stay dense where that helps most.
        ratio_options: of either.
        allocation: what that measured; empty before it ran.
        spectra: what ranks were chosen from, as the report keeps it.
        keep: of the parameters of the linears; None where goals are patterns or of a plan. Until ranks are chosen, goals are 1.
        ranks, rank_options: what gives every linear a rank; None without `keep`.
        factored: what methods that need gradients made of their linears, once that is done.
        gram_room: bytes that the Gram matrices of a block may take together; None for as many as there are.
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
        return {"options": self.every[0].options, "refine_options": self.refine_options, "ratio_options": self.ratio_options}

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
        return any(task.method.NEEDS_GRAM for task in self.every) or (self.refine is not None and self.refine.NEEDS_GRAM)

    @property
    def splits_batches(self) -> bool:
        """Whether processes that share the run each take a part of the calibration; else each takes all of it.

        Gram matrices are built by one process each, in the order of the batches: sums of sums have other bits.
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
        return {linear.experts for linear in self._linears if linear.experts in chosen and linear.name not in tasks}

    @cached_property
    def _unpackable(self) -> set[str]:
        """Names of the modules whose experts are stored as plain weights: a loader needs all their matrices packed, or none."""

        def plain(task: Task) -> bool:
            form = self.fits_2_4(task) or not task.method.REFINABLE
            return not form or task.linear.at is not None or not only_stacks(task.linear.module.owner)

        return self._partial | {task.linear.experts for task in self.every if task.linear.experts and plain(task)}

    @property
    def _linears(self) -> list[Linear]:
        return [linear for index in range(len(self.tasks)) for linear in self.skeleton.linears(index)]

    def check_experts(self) -> Job:
        """The job itself. Raises UsageError where experts would have to be stored in a way that they cannot be."""
        for task in self.every:
            name = task.linear.experts
            if not task.method.REFINABLE and name in self._unpackable:
                shared = task.linear.at is not None
                why = "keeps all experts in one tensor" if shared else "has some experts that stay dense, or biases"
                glob = f"*{task.linear.name.split('.')[-2]}.*" if shared else "*experts*"
                raise UsageError(
                    f"{name} {why}: factors cannot be stored for {task.linear.name}; "
                    f"use a method that prunes, or leave them all dense with --ignore '{glob}'"
                )
        return self

    def assign(self, goals: Mapping[str, Pattern | int | None], reason: str) -> Job:
        """The job with these goals, by linear name; a linear whose goal is None stays dense, for `reason`."""
        left = [
            LeftDense(task.linear.name, list(task.linear.shape), reason) for task in self.every if goals[task.linear.name] is None
        ]
        tasks = [[_suited(task, goal) for task in block if (goal := goals[task.linear.name]) is not None] for block in self.tasks]
        return replace(self, tasks=tasks, left_dense=left + self.left_dense).check_experts()


def _suited(task: Task, goal: Pattern | int) -> Task:
    """The task with this goal, and with a method that can meet it."""
    ranked = isinstance(goal, int)
    if factors(task.method) == ranked:
        return replace(task, goal=goal)
    other = counterpart(task.method.__name__.rpartition(".")[2])
    return replace(task, goal=goal, method=method_module(other), options={}, refined=not ranked)


def make_job(recipe: Recipe, output: Path | None) -> Job:
    """Check everything cheap: names, options, output, checkpoint, pattern against every linear, dataset, lengths."""
    pattern = Pattern.parse(recipe.pattern)
    method = method_module(recipe.method)
    options = check_options(f"method {recipe.method}", options_of(method), recipe.options)
    refine = refinement(recipe.refine) if recipe.refine else None
    refine_options = check_options(f"refinement {recipe.refine}", refine.refine, recipe.refine_options) if refine else {}
    if refine and not method.REFINABLE:
        raise UsageError(f"--refine improves a plain pruned weight; method {recipe.method} stores another form")
    entries = plan.read(Path(recipe.plan)) if recipe.plan else {}
    if factors(method):
        rehearse_rank(method, options)
    else:
        for each in plan.patterns(entries) if entries else [pattern]:
            rehearse(method, options, refine, refine_options, each)
    goal = 1 if factors(method) else pattern
    allocation = _ranks(recipe, method) if factors(method) else _allocation(recipe, pattern)
    reader = Reader(resolve(recipe.model, recipe.revision or None))
    if output is not None:
        check_output(output, reader)
    dtype = None if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
    skeleton = Skeleton(reader, dtype=dtype, trust_remote_code=recipe.trust_remote_code)
    seq_len = _sequence_length(recipe.seq_len, data.context_length(skeleton.config))
    blocks, left_dense = _choose(skeleton, recipe.ignore)
    for linear in (linear for block in blocks for linear in block):
        if not entries and not factors(method):
            pattern.check_width(linear.name, linear.shape[1])
        if (stored := reader.tensors[linear.tensor].dtype) not in WEIGHT_DTYPES:
            raise CheckpointError(f"{linear.tensor} is stored as {stored}; float32, float16 and bfloat16 can be compressed")
    refined = _refined(recipe, [linear.name for block in blocks for linear in block])
    tasks = [[Task(linear, method, options, goal, linear.name in refined) for linear in block] for block in blocks]
    job = Job(
        reader=reader, skeleton=skeleton, tasks=tasks, refine=refine, refine_options=refine_options, tune=recipe.tune,
        packed=recipe.format == "packed", all_tokens=recipe.expert_tokens == "all", seq_len=seq_len, seed=recipe.seed,
        left_dense=left_dense, **allocation,
    )  # fmt: skip
    if job.needs_inputs:
        data.check_dataset(recipe.dataset)
    if job.keep:  # every choice of ranks begins with these
        uniform.of_shapes({task.linear.name: task.linear.shape for task in job.every}, job.keep, job.rank_options.get("align", 0))
    if not entries:
        return job.check_experts()
    goals = plan.fit(entries, [task.linear for task in job.every], {left.name: left.reason for left in left_dense})
    if not any(goals.values()):
        raise UsageError(f"there is nothing to compress: the plan {recipe.plan} leaves every linear dense")
    return job.assign(goals, "the plan")


def _refined(recipe: Recipe, names: list[str]) -> set[str]:
    """Names of the linears that the refinement is for."""
    for glob in recipe.refine_only:
        if not recipe.refine:
            raise UsageError(f"--refine-only {glob!r} is for --refine, which is not given")
        if not any(fnmatchcase(name, glob) for name in names):
            raise UsageError(f"--refine-only {glob!r} matches no linear; names look like {names[0]!r}")
    return {name for name in names if not recipe.refine_only or any(fnmatchcase(name, glob) for glob in recipe.refine_only)}


def _ranks(recipe: Recipe, method: ModuleType) -> dict[str, Any]:
    """The fields keep, ranks and rank_options of a job that makes factors."""
    if recipe.ratios or recipe.dense_fraction or recipe.ratio_options:
        raise UsageError(f"method {recipe.method} makes factors: --ratios and --dense-fraction are for patterns; give --ranks")
    if bool(recipe.keep) == bool(recipe.plan):
        raise UsageError(
            "--plan says what every linear becomes; --keep would choose it again: give one of them" if recipe.plan
            else f"method {recipe.method} makes factors: give --keep, such as 70%, of the linears' parameters"
        )  # fmt: skip
    if recipe.plan:
        if recipe.ranks or recipe.rank_options:
            raise UsageError("--ranks chooses what --plan says already: give one of them")
        return {}
    name = recipe.ranks or method.RANKS
    module = rank_allocator(name)
    options = check_options(f"ranks {name}", module.allocate, recipe.rank_options)
    check_align(options.get("align", 0))
    rehearse_ranks(module, options)
    return {"keep": parse_fraction("keep", recipe.keep), "ranks": module, "rank_options": options}


def _allocation(recipe: Recipe, pattern: Pattern) -> dict[str, Any]:
    """What was asked for beyond one goal for all: the fields ratios, dense_fraction and ratio_options of the job."""
    if recipe.keep or recipe.ranks or recipe.rank_options:
        raise UsageError(f"--keep and --ranks are for methods that make factors, such as kfac; {recipe.method} prunes")
    if recipe.plan and (recipe.ratios or recipe.dense_fraction):
        raise UsageError(
            "--plan says what every linear becomes; --ratios and --dense-fraction would choose it again: give one of them"
        )
    if recipe.ratios and pattern.m:
        raise UsageError(
            f"--ratios shares out zeros, and {pattern} leaves none to share: "
            "give a sparsity such as --pattern 50%, or let linears stay dense with --dense-fraction 10%"
        )
    if recipe.ratios:
        if recipe.dense_fraction:
            raise UsageError("--dense-fraction is for n:m patterns; --ratios may leave linears dense by itself")
        module = allocator(recipe.ratios)
        options = check_options(f"ratios {recipe.ratios}", module.allocate, recipe.ratio_options)
        check_ratio_options(options, pattern.sparsity)
        return {"ratios": module, "ratio_options": options}
    if recipe.dense_fraction:
        if not pattern.m:
            raise UsageError(f"--dense-fraction is for n:m patterns; for a sparsity of {pattern} use --ratios")
        from compressor.ratios import dense

        options = check_options("--dense-fraction", dense.choose, recipe.ratio_options)
        check_ratio_options(options, pattern.sparsity)
        return {"dense_fraction": parse_fraction("dense-fraction", recipe.dense_fraction), "ratio_options": options}
    if recipe.ratio_options:
        raise UsageError(f"ratios.{min(recipe.ratio_options)} is an option of --ratios or --dense-fraction; neither is given")
    return {}


def _sequence_length(asked: int, limit: int | None) -> int:
    if asked and limit and asked > limit:
        raise UsageError(f"seq-len {asked} is longer than the {limit} tokens this model was made for")
    return asked or min(2048, limit or 2048)


def _choose(skeleton: Skeleton, ignore: list[str]) -> tuple[list[list[Linear]], list[LeftDense]]:
    """Split the weights into those to compress and those left dense, with reasons. Nothing is skipped in silence."""
    blocks: list[list[Linear]] = []
    left: list[LeftDense] = []
    unused = set(ignore)

    def matching(name: str) -> str | None:
        hits = [glob for glob in ignore if fnmatchcase(name, glob)]
        unused.difference_update(hits)
        return hits[0] if hits else None

    for index in range(len(skeleton.blocks)):
        blocks.append([])
        for linear in skeleton.linears(index):
            if glob := matching(linear.name):
                left.append(LeftDense(linear.name, list(linear.shape), f"--ignore {glob}"))
            else:
                blocks[-1].append(linear)
        for name, shape, reason in skeleton.others(index):
            glob = matching(name)
            if len(shape) > 2 and min(shape) > 1 and not glob:  # a convolution over time is [channels, 1, width]
                raise CheckpointError(
                    f"{name} has shape {list(shape)}: weights stacked in this way are not supported; "
                    f"leave them dense with --ignore '*{name.split('.')[-1]}'"
                )
            left.append(LeftDense(name, list(shape), f"--ignore {glob}" if glob else reason))
    if unused:
        example = blocks[0][0].name if blocks and blocks[0] else "none"
        raise UsageError(f"--ignore {min(unused)!r} matches no linear; names look like {example!r}")
    if not any(blocks):
        raise UsageError("there is nothing to compress: the decoder blocks hold no linears, or all are ignored")
    left += _outside(skeleton)
    return blocks, left


def _outside(skeleton: Skeleton) -> list[LeftDense]:
    """Matrices on disk that belong to no decoder block of the model."""
    known = {name for name, _ in skeleton.model.named_parameters(remove_duplicate=False)}
    left = []
    for name, tensors in skeleton.on_disk.items():
        if name.startswith(f"{skeleton.path}.") and name in known:
            continue
        reason = "outside the decoder blocks" if name in known else "not part of the model that config.json describes"
        shapes = {tensor: skeleton.reader.tensors[tensor].shape for tensor in tensors}
        left += [LeftDense(tensor, list(shape), reason) for tensor, shape in shapes.items() if len(shape) >= 2]
    return left
