"""What a run needs of memory and of disk, counted before it starts: it keeps within what is there,
or is refused.

Hidden states give way: where memory has no room for them they rest on disk
(compressor/engine/memory.py). What is counted here does not: the work on a block, and that of the
passes over the dense model by which targets and factors are chosen.
"""

from __future__ import annotations

import inspect
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from compressor.allocation import guard
from compressor.allocation.rank import fisher_factors, largest_rank
from compressor.allocation.sparsity import leave_dense
from compressor.calibration.capture import batch_size
from compressor.checkpoint.work_state import work_path
from compressor.engine import memory
from compressor.engine.memory import (
    block_bytes,
    choose_home,
    factoring_bytes,
    gram_bytes,
    hidden_bytes,
    largest_block,
    parse_size,
)
from compressor.engine.plan import LeaveDense, Plan, ShareRanks, ShareZeros
from compressor.engine.task import Rank, Task
from compressor.errors import OutputError, UsageError
from compressor.text import size

_PRECISE = 4  # bytes of a number in the passes that are made in float32
_LEVELS = 20  # of sparsity that `curve` looks at, at most
_LOGITS = 6  # copies of a batch's logits in float32 at once: probabilities, gradients, differences


@dataclass(frozen=True)
class Pass:
    """A pass over the model.

    Attributes:
        name: what takes the memory, for people.
        work: bytes of memory, the resting hidden states aside.
        states: bytes of its hidden states, which rest where those of the calibration do.
        disk: bytes on disk, wherever these rest.
    """

    name: str
    work: int
    states: int = 0
    disk: int = 0


@dataclass(frozen=True)
class Counts:
    """Sizes that what passes need is counted from.

    Attributes:
        tokens: of the calibration, in this process.
        batch: tokens in one batch.
    """

    plan: Plan
    tokens: int
    batch: int

    @property
    def width(self) -> int:
        """Numbers in the hidden state of a token."""
        return hidden_bytes(self.plan, 1) // self.itemsize // (2 if self.plan.keeps_dense else 1)

    @property
    def itemsize(self) -> int:
        """Bytes of a number of the model as it is computed."""
        return self.plan.skeleton.dtype.itemsize

    def part(self, tokens: int) -> int:
        """Tokens of the first batches that hold so many."""
        return min(self.tokens, -(-tokens // self.batch) * self.batch)

    @cached_property
    def through_linears(self) -> int:
        """Numbers that enter and leave the linears of a block for one token, for the block with
        most of them. Linears that read one tensor are counted each.
        """
        return max(
            sum(int(sum(linear.shape) * self._share(linear)) for linear in linears)
            for linears in map(self.plan.skeleton.linears, range(len(self.plan.tasks)))
        )

    def _share(self, linear: Any) -> float:
        """The part of the tokens that a linear sees: an expert sees those routed to it."""
        if not linear.experts:
            return 1
        config = self.plan.skeleton.config.get_text_config(decoder=True)
        chosen = getattr(config, "num_experts_per_tok", None)
        return min(1, chosen / linear.module.owner.num_experts) if chosen else 1

    def head(self, itemsize: int) -> int:
        """Bytes of what comes before and after the blocks, and of the logits of a batch."""
        skeleton = self.plan.skeleton
        outside = sum(
            parameter.numel()
            for name, parameter in skeleton.model.named_parameters()
            if not name.startswith(f"{skeleton.path}.")
        )
        vocabulary = getattr(skeleton.config.get_text_config(decoder=True), "vocab_size", 0)
        return outside * itemsize + self.batch * vocabulary * (_LOGITS * _PRECISE + itemsize)

    def activations(self, itemsize: int) -> int:
        """Bytes that one batch takes on its way through a block, and copies of it."""
        return 2 * self.batch * self.through_linears * itemsize


def passes(plan: Plan, tokens: int, batch: int) -> list[Pass]:
    """Everything a run goes through, in order, with what it needs; arguments as for `Counts`."""
    counts = Counts(plan, tokens, max(batch, 1))
    block = block_bytes(plan)
    if plan.needs_inputs:
        block += counts.activations(counts.itemsize) + _sample_bytes(plan) + _error_bytes(plan)
    found = []
    if plan.needs_gradients:
        found.append(_gradients(counts, fisher_factors.TOKENS, _fisher))
    match plan.choice:
        case ShareRanks() if plan.measures:
            grams = sum(map(gram_bytes, _largest(plan))) if plan.needs_gram else 0
            part = counts.part(guard.TOKENS) * counts.width * counts.itemsize
            if not plan.needs_gradients:
                found.append(Pass("the statistics of a whole block", block + grams, part))
            found.append(_trial(counts, block))
        case ShareZeros() as asked if asked.measures:
            name = asked.allocator.__name__.rpartition(".")[2]
            found += [_shares(counts, name, asked, block), _trial(counts, block)]
        case LeaveDense() as asked:
            tokens = _option(leave_dense.select, asked.options, "tokens")
            found += [_gradients(counts, tokens, _curve), _trial(counts, block)]
    return [*found, Pass("one block", block)]


def check(plan: Plan, samples: int, output: Path | None, device: torch.device, limit: str) -> None:
    """Raise where memory or disk are too little for a run, before it begins.

    Args:
        plan: what will be done.
        samples: of the calibration, without those that are held out beside them.
        output: the folder to be made; without one the disk is not looked at.
        device: where blocks are computed; a GPU's memory is not counted.
        limit: `--max-memory`; empty for what is free.

    Raises:
        UsageError: the memory is too little.
        OutputError: the disk is.
    """
    tokens = (samples + plan.further(samples)) * plan.seq_len
    needs = passes(plan, tokens, batch_size(samples, plan.seq_len) * plan.seq_len)
    if device.type != "cuda":
        _check_memory(needs, limit)
    local = 1 if plan.splits_batches else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if output:
        _check_disk(output, plan.reader.nbytes + disk_bytes(plan, needs, tokens * local))


def check_choice(plan: Plan, samples: int, folder: Path, device: torch.device, limit: str) -> None:
    """As `check`, where targets are chosen and nothing is made of them: what that keeps on disk
    lies in `folder`, which exists.
    """
    check(plan, samples, None, device, limit)
    tokens = samples * plan.seq_len
    needs = passes(plan, tokens, batch_size(samples, plan.seq_len) * plan.seq_len)
    beside = max(each.states for each in needs)
    resting = choose_home(plan, tokens, device, limit, folder, beside) == folder
    needed = kept_bytes(plan, needs, tokens, resting=resting)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OutputError(
            f"what choosing keeps on disk may need {size(needed)}; {folder.parent} has "
            f"{size(free)} free: TMPDIR names another folder"
        )


def _check_memory(needs: Iterable[Pass], limit: str) -> None:
    import psutil

    rss = psutil.Process().memory_info().rss
    room = parse_size(limit) if limit else rss + memory.free()
    for each in needs:
        if rss + each.work > room:
            given = f"`max_memory` {limit} is" if limit else f"the free memory, {size(room)}, is"
            raise UsageError(
                f"{given} too little: {each.name} and the libraries take about "
                f"{size(rss + each.work)}{_advice(each, limit)}"
            )


def states_bytes(plan: Plan, tokens: int, batch: int) -> int:
    """Bytes of hidden states, at most, that passes keep beside those of the calibration; arguments
    as for `Counts`.
    """
    return max(each.states for each in passes(plan, tokens, batch))


def disk_bytes(plan: Plan, needs: Iterable[Pass], tokens: int) -> int:
    """Bytes on disk beside the output: what is kept, and the shard that is put together."""
    shards: dict[str, int] = {}
    for entry in plan.reader.tensors.values():
        shards[entry.shard] = shards.get(entry.shard, 0) + entry.nbytes
    return kept_bytes(plan, needs, tokens) + max(shards.values(), default=0)


def kept_bytes(plan: Plan, needs: Iterable[Pass], tokens: int, *, resting: bool = True) -> int:
    """Bytes on disk of two generations of hidden states, if they rest there, of what the passes
    keep, and of the factors of all blocks.
    """
    kept = max(each.disk + each.states * resting for each in needs)
    hidden = 2 * hidden_bytes(plan, tokens) if plan.needs_inputs and resting else 0
    factors = sum(_factors(task) for task in plan.every if task.needs_gradients)
    return hidden + kept + factors * plan.skeleton.dtype.itemsize


def _check_disk(output: Path, needed: int) -> None:
    """Raise OutputError where the disk of `output` lacks `needed` bytes; what an earlier run left
    in its work state counts as free.
    """
    parent = output.resolve().parent
    while not parent.exists():
        parent = parent.parent
    left = sum(path.stat().st_size for path in work_path(output).rglob("*") if path.is_file())
    free = shutil.disk_usage(parent).free + left
    if free < needed:
        raise OutputError(
            f"output {output} and what is kept on disk meanwhile may need {size(needed)}; "
            f"{parent} has {size(free)} free"
        )


def _advice(each: Pass, limit: str) -> str:
    if limit:
        return "; take fewer tokens, or choose what measures less" if each.states else ""
    return "; to try all the same, say with `max_memory` how much may be used"


def _largest(plan: Plan) -> tuple[Task, ...]:
    """The tasks of the block whose inputs are widest in sum."""
    return max(plan.tasks, key=lambda tasks: sum(task.linear.shape[1] for task in tasks))


def _sample_bytes(plan: Plan) -> int:
    """Bytes of the sampled inputs of a block's linears."""
    return sum(4 * memory.SAMPLE_TOKENS * task.linear.shape[1] for task in _largest(plan))


def _error_bytes(plan: Plan) -> int:
    """Bytes that measuring the error of one linear takes: the sampled inputs once more, both
    outputs, and one of them in float64 with its squares.
    """
    shapes = [task.linear.shape for task in plan.every]
    return max(memory.SAMPLE_TOKENS * (4 * columns + 24 * rows) for rows, columns in shapes)


def _gradients(counts: Counts, tokens: int, work: Callable[[Counts, Task], int]) -> Pass:
    """A forward and a backward pass in float32, and `work` with the rows of one linear."""
    plan, part = counts.plan, counts.part(tokens)
    states = part * counts.width * _PRECISE
    inside = max(work(counts, task) for task in plan.every)
    rows = part * counts.through_linears * _PRECISE
    graph = 2 * counts.activations(_PRECISE)  # what autograd keeps lies between the linears too
    block = 2 * largest_block(plan) * _PRECISE + graph + rows + inside
    return Pass(
        "the inputs and gradients of a block",
        max(block, counts.head(_PRECISE)),
        2 * states,
        len(plan.skeleton.blocks) * states,
    )


def _factors(task: Task) -> int:
    """Numbers of the factors that are kept of one linear: of the largest rank that pays, or of the
    one that was asked for.
    """
    rank = task.target if isinstance(task.target, Rank) else largest_rank(task.linear.shape)
    return rank * sum(task.linear.shape)


def _fisher(counts: Counts, task: Task) -> int:
    """Bytes of both Kronecker factors, and of factoring by them."""
    rows, columns = task.linear.shape
    return 4 * (rows**2 + columns**2) + factoring_bytes(task)


def _curve(counts: Counts, task: Task) -> int:
    """Bytes of a block's statistics, of a compressed weight and its change, and of what this does
    to a batch.
    """
    grams = 3 * sum(map(gram_bytes, _largest(counts.plan))) if task.method.NEEDS_GRAM else 0
    rows, columns = task.linear.shape
    return (
        grams
        + _sample_bytes(counts.plan)
        + 32 * task.linear.size
        + 12 * counts.batch * (rows + columns)
    )


def _first_order(counts: Counts, task: Task) -> int:
    """Bytes of the gradient of a weight, its size and the weight."""
    return 16 * task.linear.size


def _shares(counts: Counts, name: str, asked: ShareZeros, block: int) -> Pass:
    """The pass of an allocator that shares out zeros."""
    plan, width = counts.plan, counts.width
    allocate, given = asked.allocator.allocate, asked.options
    if name == "owl":
        scores = 8 * max(sum(task.linear.size for task in tasks) for tasks in plan.tasks)
        states = counts.tokens * width * counts.itemsize
        return Pass("the scores of a block", block + scores, states)
    tokens = _option(allocate, given, "tokens")
    states = counts.part(tokens) * width * _PRECISE
    moving = 2 * largest_block(plan) * _PRECISE + counts.activations(_PRECISE)
    moving += 16 * max(task.linear.size for task in plan.every)
    if name == "ecoflap" and _option(allocate, given, "score") == "zeroth":
        tries = 2 * _option(allocate, given, "evaluations") * max(map(len, plan.tasks))
        work = max(moving, counts.head(_PRECISE))
        return Pass("the model in float32", work, 2 * states + tries * counts.batch * width * 4)
    if name == "curve" and _option(allocate, given, "direct"):
        work = moving + max(_curve(counts, task) for task in plan.every)
        work = max(work, counts.head(_PRECISE))
        return Pass("the model in float32", work, (4 + _LEVELS) * states)
    return _gradients(counts, tokens, _curve if name == "curve" else _first_order)


def _trial(counts: Counts, block: int) -> Pass:
    """Two plans compared on a part of the calibration."""
    states = counts.part(guard.TOKENS) * counts.width * counts.itemsize
    return Pass("a trial", max(block, counts.head(counts.itemsize)), 2 * states)


def _option(function: Callable[..., Any], given: Mapping[str, Any], name: str) -> Any:
    """What was given for a keyword of `function`, or its default."""
    return given.get(name, inspect.signature(function).parameters[name].default)
