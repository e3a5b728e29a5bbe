"""The loop over the blocks: statistics, compression, the inputs of the next block. Nothing is
written here.

For each block: load it, run the calibration states through it and collect statistics, compress its
linears, tune it if asked, run the states through the compressed block to get the inputs of the
next, free it. Peak memory is one block, the calibration states and the statistics of one block;
where its Gram matrices would not fit, the linears are taken group by group, with a pass through the
block, still dense, for each.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from itertools import count

import torch
from torch import Tensor

from compressor.calibration import capture
from compressor.calibration.arguments import Arguments
from compressor.calibration.capture import States
from compressor.calibration.hidden_states import Batch, advance
from compressor.engine.block_tuning import tune
from compressor.engine.distributed import ALONE, Group
from compressor.engine.loaded_block import LoadedBlock, Watch
from compressor.engine.match import compress_matched
from compressor.engine.observe import in_room, observe
from compressor.engine.one_linear import Compressed, Seen, compress_weight, finish
from compressor.engine.pairs import UNMATCHED, Stage, observe_pairs, stages
from compressor.engine.plan import Plan, Prepared
from compressor.engine.task import Rank, Task
from compressor.errors import NumericalError
from compressor.formats import Form
from compressor.model import heap
from compressor.model.experts import ExpertLinear, stacked
from compressor.progress import Progress
from compressor.records.report import BlockRow
from compressor.stats import InputStats, all_finite, collecting

_GIVE_BACK = 1 << 23  # bytes of weights, after work on which freed memory goes back to the system


Store = Callable[[Task, Form, Seen | None], None]
"""Told of each finished linear: its task, the form it has now, what the calibration showed of it.
"""


def unwatched(index: int, entering: Batch, leaving: Tensor) -> None:
    """Nothing."""


def compress_blocks(
    plan: Plan,
    states: States | None,
    device: torch.device,
    store: Store,
    progress: Progress,
    *,
    first: int = 0,
    group: Group = ALONE,
    prepared: Prepared = Prepared(),  # noqa: B008  # frozen
    watch: Watch = unwatched,
) -> Iterator[BlockRow]:
    """Compress block after block; yields the row of each once `store` has been told of its linears.

    Args:
        plan: what to do; every task has a target.
        states: calibration on entering block `first`, run through the compressed blocks in place;
            None where none is needed.
        device: where the blocks are computed.
        store: told of each finished linear.
        progress: told after each linear.
        first: the block to begin with.
        group: the processes that share the work.
        prepared: what the run has ready for the blocks.
        watch: told of the first batch of this process in each block.

    Raises:
        NumericalError: a weight, a compressed weight or the output of a block is not finite.
    """
    for index in range(first, len(plan.tasks)):
        block = LoadedBlock(
            plan,
            index,
            plan.tasks[index],
            plan.skeleton.load_block(index, device),
            states,
            states.arguments[index] if states else Arguments(),
            device,
            group if plan.splits_batches else ALONE,
            prepared,
            watch,
        )
        error = _compress_block(block, store, progress, group)
        plan.skeleton.free_block(index)
        yield BlockRow(index, error)


def dense_blocks(
    plan: Plan, states: States, device: torch.device, *, gram: bool = False
) -> Iterator[tuple[tuple[Task, ...], dict[str, InputStats]]]:
    """Each block of the dense model, loaded meanwhile: its tasks and, by linear, the statistics of
    their inputs.

    Args:
        plan: its tasks' linears are observed.
        states: calibration on entering block 0, left as it is.
        device: where the blocks are computed.
        gram: whether the statistics need the Gram matrix.

    Raises:
        NumericalError: a linear saw no tokens, or others than finite ones.
    """
    hidden = states.entering()
    for index, tasks in enumerate(plan.tasks):
        block = plan.skeleton.load_block(index, device)
        with collecting(
            {task.linear.name: task.linear.module for task in tasks}, gram=gram
        ) as stats:
            advance(hidden, capture.through(block, states.arguments[index]))
        for task in tasks:
            (stats.get(task.linear.name) or InputStats(1)).check(task.linear.name)
        yield tasks, stats
        plan.skeleton.free_block(index)


def _compress_block(
    block: LoadedBlock, store: Store, progress: Progress, group: Group
) -> float | None:
    """Compress one block; returns the relative squared error of its output, None without
    calibration.

    With matched targets its linears are taken in stages, each on inputs that know of those before;
    linears that cannot be matched come last. The dense model's hidden states leave the block before
    these are compressed, while it can still be made dense.
    """
    plan, states, numbers = block.plan, block.states, count(1)

    def told(task: Task, form: Form, seen: Seen | None) -> None:
        if plan.tune:
            block.untuned[task.linear.name] = form
        else:
            store(task, form, seen)
        losses, number = getattr(form, "losses", None), next(numbers)
        progress("linears", number, len(block.tasks), linear=task.linear.name, losses=losses)

    found, others = stages(block) if plan.strengths else ([], list(block.tasks))
    for stage in found:
        _compress(block, stage.tasks, stage, told, group)
    if states and plan.keeps_dense:
        with block.originals.in_place():
            for each in filter(None, (states, states.held_out)):
                advance(each.dense, capture.through(block.module, each.arguments[block.index]))
        block.originals.forget()
    if others:
        _compress(block, others, None, told, group)
    if states and plan.tune:
        forms = _tune(block, states)
        for task in block.tasks:
            name, weight = task.linear.name, task.linear.read(plan.reader).to(block.device)
            form, seen = finish(plan, task, weight, forms[name], block.inputs.get(name))
            task.linear.set(form.dense())  # compute with what is stored from now on
            store(task, form, seen)
    return _advance(block, states) if states else None


def _compress(
    block: LoadedBlock, tasks: list[Task], stage: Stage | None, told: Store, group: Group
) -> None:
    """Compress linears of a block, those of a `stage` or others; `told` of each. They compute with
    the result from then on; those of no stage, where the block is tuned, after that.
    """
    owners = group.owners([_cost(block.plan, task) for task in tasks])
    own = [task for task, owner in zip(tasks, owners, strict=True) if owner == group.rank]
    compressed = group.shared(owners, _compressed(block, own, stage), block.device)
    for task, (form, seen) in zip(tasks, compressed, strict=True):
        if stage:
            block.originals.replace(task.linear, form.dense())
        elif not block.plan.tune:
            task.linear.set(form.dense())
        told(task, form, seen)


def _cost(plan: Plan, task: Task) -> int:
    """About what compressing a linear takes, to share the linears out among processes."""
    rows, columns = task.linear.shape
    return rows * columns ** (2 if plan.needs_gram else 1)


def _compressed(block: LoadedBlock, own: list[Task], stage: Stage | None) -> Iterator[Compressed]:
    """What becomes of each linear of this process; before the tuning, where there is one.

    One by one, or all at the end where they are observed in several groups: the block has to stay
    as it is meanwhile.

    Args:
        block: whose linears they are.
        own: the tasks of this process.
        stage: that they are of, if they are matched.
    """
    plan = block.plan
    groups = [own] if stage else in_room(block, own)
    waiting: list[Compressed] = []
    worked_on = 0
    for tasks in groups:
        stats = _observed(block, tasks, stage)
        heap.give_back()
        for task in tasks:
            name, weight = task.linear.name, task.linear.read(plan.reader).to(block.device)
            form, seen = _form(block, task, weight, stats.get(name)), None
            if not plan.tune:
                form, seen = finish(plan, task, weight, form, stats.get(name))
            worked_on += weight.nbytes
            if worked_on >= _GIVE_BACK:
                heap.give_back()
                worked_on = 0
            if len(groups) == 1:
                yield form, seen
            else:
                waiting.append((form, seen))
        for used in stats.values():
            used.gram = used.cross = None
        if plan.tune:
            block.inputs.update(stats)
    yield from waiting


def _observed(
    block: LoadedBlock, tasks: list[Task], stage: Stage | None
) -> Mapping[str, InputStats]:
    """What the tasks' linears read, by name."""
    if stage:
        return observe_pairs(block, stage) if tasks else {}
    stats = observe(block, block.tasks if block.plan.splits_batches else tasks)
    for inputs in set(stats.values()) if block.plan.strengths else ():
        inputs.note = "; ".join(filter(None, [inputs.note, UNMATCHED]))
    return stats


def _form(block: LoadedBlock, task: Task, weight: Tensor, stats: InputStats | None) -> Form:
    """The form of `weight` `[out, in]`, refined if asked."""
    if block.plan.needs_inputs:
        (stats or InputStats(1)).check(task.linear.name)
    factors = block.prepared.factors
    if factors and task.needs_gradients and isinstance(task.target, Rank):
        return factors.of(task.linear.name, task.target, weight.device)
    if stats is not None and stats.cross is not None:
        return compress_matched(block.plan, task, weight, stats)
    return compress_weight(block.plan, task, weight, stats)


def _tune(block: LoadedBlock, states: States) -> dict[str, Form]:
    """The forms of a block's linears, trained together."""
    prefix = f"{block.name}."

    def place(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        placed: dict[str, Tensor] = {}
        stacks: dict[str, list[tuple[ExpertLinear, Tensor]]] = {}
        for linear in (task.linear for task in block.tasks):
            weight = weights[linear.name].T if linear.transposed else weights[linear.name]
            name = linear.parameter.removeprefix(prefix)
            if linear.experts:
                stacks.setdefault(name, []).append((linear.module, weight))
            else:
                placed[name] = weight
        return placed | {name: stacked(parts) for name, parts in stacks.items()}

    tuned, _, _ = tune(
        block.module,
        block.untuned,
        states.hidden,
        states.dense,
        block.arguments,
        place=place,
        epochs=block.plan.tune,
        seed=block.plan.seed,
    )
    return tuned


def _advance(block: LoadedBlock, states: States) -> float:
    """Run the states through the compressed block, in place; returns the error against the `exact`
    outputs.

    Raises:
        NumericalError: what leaves the block is not finite.
    """
    errors: list[tuple[float, float]] = []

    def step(batch: Batch) -> Batch:
        leaving = capture.run(block.module, batch, block.arguments)
        if not all_finite(leaving.hidden):
            raise NumericalError(
                f"what leaves {block.name} is not finite (NaN or Inf activations): try "
                "`dtype='bfloat16'` or `dtype='float32'`"
            )
        if batch.number < len(block.exact):
            errors.append(_squares(leaving.hidden, block.exact[batch.number]))
        if batch.number == 0:
            block.watch(block.index, batch, leaving.hidden)
        return leaving

    advance(states.hidden, step)
    if held_out := states.held_out:
        advance(held_out.hidden, capture.through(block.module, held_out.arguments[block.index]))
    everywhere = block.sharing.joined(errors)
    return sum(difference for difference, _ in everywhere) / max(
        sum(total for _, total in everywhere), 1e-300
    )


def _squares(output: Tensor, exact: Tensor) -> tuple[float, float]:
    """‖output - exact‖² and ‖exact‖², in float32, or in float64 where that overflows."""

    def squares(dtype: torch.dtype) -> tuple[float, float]:
        wide = exact.to(dtype)
        difference = output.to(dtype) - wide
        return difference.square().sum().item(), wide.square().sum().item()

    narrow = squares(torch.float32)
    return narrow if math.isfinite(sum(narrow)) else squares(torch.float64)
