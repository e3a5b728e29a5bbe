"""What a run will do, checked before any work: names, options, output, pattern against every
linear, dataset, lengths.
"""

from __future__ import annotations

import math
from fnmatch import fnmatchcase
from fractions import Fraction
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from compressor.allocation.rank import allocator as rank_allocator
from compressor.allocation.rank import check_align, uniform
from compressor.allocation.sparsity import allocator, leave_dense
from compressor.allocation.sparsity.options import check as check_ratio_options
from compressor.calibration import tokens
from compressor.checkpoint.dequantised import open_model
from compressor.checkpoint.download import resolve
from compressor.checkpoint.reader import Reader
from compressor.checkpoint.writer import check_output
from compressor.config.options import check_options
from compressor.config.recipe import Recipe
from compressor.engine.match import strengths
from compressor.engine.plan import LeaveDense, Plan, ShareRanks, ShareZeros
from compressor.engine.task import Task
from compressor.errors import CheckpointError, UsageError
from compressor.methods import factors, method_module, options_of
from compressor.model.linear import CONVOLUTION, WEIGHT_DTYPES, Linear, Other
from compressor.model.skeleton import Skeleton, require_finite
from compressor.pattern import Pattern, parse_fraction
from compressor.records.report import LeftDense
from compressor.refine import refinement
from compressor.run import plan_file
from compressor.run.preflight import rehearse, rehearse_rank, rehearse_ranks
from compressor.text import home_path, to_ignore

_SMALL_PART = 8  # a linear with fewer rows than this part of its columns may be called small
_SMALL_STACKS = 10  # stacked gates below this part of a block's weights stay dense, and are told of
_CHECKED_AT_ONCE = 1 << 24  # numbers of a tensor: a vocabulary is not in memory whole


def plan_run(recipe: Recipe, output: Path | None) -> Plan:
    """What a run will do, everything cheap checked: names, options, output, checkpoint, pattern
    against every linear, dataset, lengths.

    Args:
        recipe: what is asked for.
        output: the folder to be made; None where nothing will be written.

    Raises:
        CompressError: the first thing that cannot be done.
    """
    pattern = Pattern.parse(recipe.pattern)
    method = method_module(recipe.method)
    options = check_options(f"method {recipe.method}", options_of(method), recipe.options)
    refine, refine_options = _refinement(recipe, method)
    entries = plan_file.read(home_path(recipe.plan)) if recipe.plan else {}
    if factors(method):
        rehearse_rank(method, options)
    else:
        for each in plan_file.patterns(entries) if entries else [pattern]:
            rehearse(method, options, refine, refine_options, each)
    choice = _rank_choice(recipe, method) if factors(method) else _zeros_choice(recipe, pattern)
    skeleton = _skeleton(recipe, output)
    seq_len = _sequence_length(recipe.seq_len, tokens.context_length(skeleton.config))
    blocks, left_dense = _split(skeleton, recipe.ignore, recipe.min_rows)
    _check_weights(skeleton.reader, blocks, None if entries or factors(method) else pattern)
    refined = _refined(recipe, [linear for block in blocks for linear in block])
    target = None if factors(method) else pattern
    plan = Plan(
        reader=skeleton.reader, skeleton=skeleton,
        tasks=tuple(
            tuple(Task(linear, method, options, target, linear.name in refined) for linear in block)
            for block in blocks
        ),
        refine=refine, refine_options=refine_options, tune=recipe.tune,
        packed=recipe.format == "packed", all_tokens=recipe.expert_tokens == "all",
        seq_len=seq_len, seed=recipe.seed, held_out=_held_out(recipe.held_out),
        strengths=strengths(recipe.match), left_dense=left_dense, choice=choice,
    )  # fmt: skip
    if plan.needs_inputs:
        _check_dataset(recipe, skeleton)
    if isinstance(choice, ShareRanks):  # every choice of ranks begins with these
        shapes = {task.linear.name: task.linear.shape for task in plan.every}
        uniform.of_shapes(shapes, choice.keep, choice.align)
    plan = _as_planned(plan, entries, recipe.plan) if entries else plan.check_experts()
    if plan.strengths:
        _check_match(plan, recipe)
    _check_finite(skeleton)
    return plan


def _held_out(text: str) -> Fraction:
    """The fraction that `held_out` says; 0% for none."""
    return Fraction(0) if text.strip() in ("0", "0%") else parse_fraction("held_out", text)


def _as_planned(plan: Plan, entries: plan_file.Entries, file: str) -> Plan:
    """The plan with the targets of a plan file."""
    reasons = {left.name: left.reason for left in plan.left_dense}
    targets = plan_file.fit(entries, [task.linear for task in plan.every], reasons)
    if not any(targets.values()):
        raise UsageError(f"there is nothing to compress: the plan {file} leaves every linear dense")
    return plan.with_targets(targets, "the plan")


def _refinement(recipe: Recipe, method: ModuleType) -> tuple[ModuleType | None, dict[str, Any]]:
    """The refinement and its options; None and nothing where none is asked for."""
    if not recipe.refine:
        return None, {}
    refine = refinement(recipe.refine)
    options = check_options(f"refinement {recipe.refine}", refine.refine, recipe.refine_options)
    if not method.REFINABLE:
        raise UsageError(
            f"`refine` improves a plain pruned weight; method {recipe.method} stores another form"
        )
    return refine, options


def _skeleton(recipe: Recipe, output: Path | None) -> Skeleton:
    """The checkpoint, opened; `output` may be made from it."""
    reader = open_model(resolve(recipe.model, recipe.revision or None))
    if output is not None:
        check_output(output, reader)
    dtype = None if recipe.dtype == "auto" else getattr(torch, recipe.dtype)
    return Skeleton(reader, dtype=dtype, trust_remote_code=recipe.trust_remote_code)


def _check_weights(reader: Reader, blocks: list[list[Linear]], pattern: Pattern | None) -> None:
    """Raise where a linear cannot have the pattern, or has a dtype that is not accepted."""
    every = [linear for block in blocks for linear in block]
    if pattern and (odd := [one for one in every if not pattern.divides(one.shape[1])]):
        pattern.check_width(odd[0].name, odd[0].shape[1], *(linear.name for linear in odd))
    for linear in every:
        if (stored := reader.tensors[linear.tensor].dtype) not in WEIGHT_DTYPES:
            raise CheckpointError(
                f"{linear.tensor} is stored as {stored}; float32, float16 and bfloat16 can be "
                f"compressed"
            )


def _check_finite(skeleton: Skeleton) -> None:
    """Read what no block is loaded with, and the norms and biases of the blocks: all that is copied
    as it is, and small. The matrices of a block are checked when it is loaded. Of a quantised
    checkpoint all scales are read.

    Raises:
        NumericalError: a number is not finite.
        CheckpointError: a scale is not.
    """
    reader, prefix = skeleton.reader, f"{skeleton.path}."
    reader.check_scales()
    loaded = {
        tensor
        for parameter, _ in skeleton.model.named_parameters()
        if parameter.startswith(prefix)
        for tensor in skeleton.on_disk.get(parameter, ())
        if len(reader.tensors[tensor].shape) > 1
    }
    with reader.opened() as lazy:
        for name, entry in reader.tensors.items():
            if name in loaded or entry.dtype not in (*WEIGHT_DTYPES, "F64") or 0 in entry.shape:
                continue
            rows = max(1, _CHECKED_AT_ONCE // math.prod(entry.shape[1:]))
            for start in range(0, entry.shape[0], rows) if entry.shape else ():
                require_finite(name, lazy(name)[start : start + rows])


def _check_dataset(recipe: Recipe, skeleton: Skeleton) -> None:
    """What can be known of the calibration before it is read. Raises DataError."""
    tokens.check_dataset(recipe.dataset, recipe.text_column)
    if recipe.dataset == "self":
        tokens.first_token(skeleton.config, skeleton.reader.folder)


def _check_match(plan: Plan, recipe: Recipe) -> None:
    """Raise UsageError where linears cannot aim at the dense model's outputs."""
    if plan.needs_gradients or not plan.needs_gram:
        refine = f" with refinement {recipe.refine}" if recipe.refine else ""
        raise UsageError(
            f"`match` is for methods and refinements that compress by a Gram matrix: sparsegpt, "
            f"armor, svd_llm, or `refine` lsq, swap or admm; {recipe.method}{refine} does not"
        )
    if plan.chooses_strength and not plan.further(recipe.num_samples):
        raise UsageError(
            f"`match` auto chooses by samples that are held out, and `held_out` "
            f"{recipe.held_out} of {recipe.num_samples} leaves none: raise it, or give a strength "
            f"such as `match='0.5'`"
        )


def _refined(recipe: Recipe, linears: list[Linear]) -> set[str]:
    """Names of the linears that the refinement is for."""
    for glob in recipe.refine_only:
        if not recipe.refine:
            raise UsageError(f"`refine_only={glob!r}` is for `refine`, which is not given")
        if not any(_matches(linear, glob) for linear in linears):
            raise UsageError(
                f"`refine_only={glob!r}` matches no linear; names look like {linears[0].name!r}"
            )
    return {
        linear.name
        for linear in linears
        if not recipe.refine_only or any(_matches(linear, glob) for glob in recipe.refine_only)
    }


def _matches(linear: Linear, glob: str) -> bool:
    return any(fnmatchcase(name, glob) for name in linear.names)


def _rank_choice(recipe: Recipe, method: ModuleType) -> ShareRanks | None:
    """What is to choose the ranks; None where a plan file says them."""
    if recipe.ratios or recipe.dense_fraction or recipe.ratio_options:
        raise UsageError(
            f"method {recipe.method} makes factors: `ratios` and `dense_fraction` are for "
            f"patterns; give `ranks`"
        )
    if bool(recipe.keep) == bool(recipe.plan):
        if recipe.plan:
            raise UsageError(
                "`plan` says what every linear becomes; `keep` would choose it again: "
                "give one of them"
            )
        raise UsageError(
            f"method {recipe.method} makes factors: give `keep`, such as 70%, of the linears' "
            f"parameters"
        )
    if recipe.plan:
        if recipe.ranks or recipe.rank_options:
            raise UsageError("`ranks` chooses what `plan` says already: give one of them")
        return None
    name = recipe.ranks or method.RANKS
    module = rank_allocator(name)
    options = check_options(f"ranks {name}", module.allocate, recipe.rank_options)
    check_align(options.get("align", 0))
    rehearse_ranks(module, options)
    return ShareRanks(parse_fraction("keep", recipe.keep), module, options)


def _zeros_choice(recipe: Recipe, pattern: Pattern) -> ShareZeros | LeaveDense | None:
    """What is to choose the zeros; None where all linears have one pattern, or a plan file says
    them.
    """
    if recipe.keep or recipe.ranks or recipe.rank_options:
        raise UsageError(
            f"`keep` and `ranks` are for methods that make factors, such as fisher; "
            f"{recipe.method} prunes"
        )
    if recipe.plan and (recipe.ratios or recipe.dense_fraction):
        raise UsageError(
            "`plan` says what every linear becomes; `ratios` and `dense_fraction` would choose it "
            "again: give one of them"
        )
    if recipe.ratios and pattern.m:
        raise UsageError(
            f"`ratios` shares out zeros, and {pattern} leaves none to share: "
            "give a sparsity such as `pattern='50%'`, or let linears stay dense with "
            "`dense_fraction='10%'`"
        )
    if recipe.ratios and recipe.dense_fraction:
        raise UsageError(
            "`dense_fraction` is for n:m patterns; `ratios` may leave linears dense by itself"
        )
    if recipe.ratios:
        module = allocator(recipe.ratios)
        options = check_options(f"ratios {recipe.ratios}", module.allocate, recipe.ratio_options)
        check_ratio_options(options, pattern.sparsity)
        return ShareZeros(module, pattern.sparsity, options)
    if recipe.dense_fraction:
        return _dense_choice(recipe, pattern)
    if recipe.ratio_options:
        raise UsageError(
            f"ratios.{min(recipe.ratio_options)} is an option of `ratios` or `dense_fraction`; "
            f"neither is given"
        )
    return None


def _dense_choice(recipe: Recipe, pattern: Pattern) -> LeaveDense:
    if not pattern.m:
        raise UsageError(
            f"`dense_fraction` is for n:m patterns; for a sparsity of {pattern} use `ratios`"
        )
    options = check_options("`dense_fraction`", leave_dense.select, recipe.ratio_options)
    check_ratio_options(options, pattern.sparsity)
    return LeaveDense(parse_fraction("dense-fraction", recipe.dense_fraction), options)


def _sequence_length(asked: int, limit: int | None) -> int:
    if asked and limit and asked > limit:
        raise UsageError(
            f"`seq_len` {asked} is longer than the {limit} tokens this model was made for"
        )
    return asked or min(2048, limit or 2048)


def _split(
    skeleton: Skeleton, ignore: list[str], min_rows: int
) -> tuple[list[list[Linear]], list[LeftDense]]:
    """Split the weights into those to compress and those left dense, with reasons. Nothing is
    skipped in silence.
    """
    blocks: list[list[Linear]] = []
    left: list[LeftDense] = []
    stacks: list[Other] = []
    unused = set(ignore)

    def matching(*names: str) -> str | None:
        hits = [glob for glob in ignore if any(fnmatchcase(name, glob) for name in names)]
        unused.difference_update(hits)
        return hits[0] if hits else None

    for index in range(len(skeleton.blocks)):
        blocks.append([])
        for linear in skeleton.linears(index):
            glob = matching(*linear.names)
            if reason := f"--ignore {glob}" if glob else _too_small(linear, min_rows):
                left.append(LeftDense(linear.name, list(linear.shape), reason))
            else:
                blocks[-1].append(linear)
        own: list[Other] = []
        for other in skeleton.others(index):
            glob = matching(other.name, other.parameter)
            if _is_stack(other) and not glob:
                own.append(other)
            reason = f"--ignore {glob}" if glob else other.reason
            left += [LeftDense(*named, reason) for named in skeleton.stored_as(other)]
        size = sum(parameter.numel() for parameter in skeleton.blocks[index].parameters())
        if _SMALL_STACKS * sum(math.prod(stack.shape) for stack in own) > size:
            stacks += own
    _refuse_stacks(stacks)
    if unused:
        example = blocks[0][0].name if blocks and blocks[0] else "none"
        raise UsageError(f"`ignore={min(unused)!r}` matches no linear; names look like {example!r}")
    if not any(blocks):
        raise UsageError(
            "there is nothing to compress: the decoder blocks hold no linears, or all are ignored"
        )
    left += _outside(skeleton)
    return blocks, left


def _too_small(linear: Linear, min_rows: int) -> str:
    """Why a linear stays dense unless it is asked for: a gate, or a projection to so few numbers
    that each of them matters and that hardly a byte would be saved. Empty where it does not.
    """
    rows, columns = linear.shape
    few = rows < min(min_rows, columns // _SMALL_PART) and not linear.experts
    return f"fewer than {min_rows} rows" if few else ""


def _is_stack(other: Other) -> bool:
    """Whether it is matrices stacked in a way that is not understood."""
    stacked = (
        len(other.shape) > 2 and min(other.shape) > 1
    )  # a state space has [channels, 1, width]
    return stacked and other.reason != CONVOLUTION


def _refuse_stacks(stacks: list[Other]) -> None:
    """Raise CheckpointError where there are any: they may be most of the model, and would stay
    dense.
    """
    if stacks:
        first = stacks[0]
        raise CheckpointError(
            f"{first.name} has shape {list(first.shape)}: weights stacked in this way are not "
            f"supported; leave them dense with {to_ignore(*(stack.name for stack in stacks))}"
        )


def _outside(skeleton: Skeleton) -> list[LeftDense]:
    """Matrices on disk that belong to no decoder block of the model."""
    known = {name for name, _ in skeleton.model.named_parameters(remove_duplicate=False)}
    left = []
    for name, tensors in skeleton.on_disk.items():
        if name.startswith(f"{skeleton.path}.") and name in known:
            continue
        reason = (
            "outside the decoder blocks"
            if name in known
            else "not part of the model that config.json describes"
        )
        shapes = {tensor: skeleton.reader.tensors[tensor].shape for tensor in tensors}
        left += [
            LeftDense(tensor, list(shape), reason)
            for tensor, shape in shapes.items()
            if len(shape) >= 2
        ]
    return left
