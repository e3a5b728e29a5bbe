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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from compressor.calibration import capture
from compressor.calibration.arguments import Arguments
from compressor.calibration.capture import States
from compressor.calibration.hidden_states import Batch, advance
from compressor.calibration.last_linear import sparing_last
from compressor.engine.block_tuning import tune
from compressor.engine.distributed import ALONE, Group
from compressor.engine.memory import gram_bytes, in_groups
from compressor.engine.one_linear import Compressed, Seen, compress_weight, finish
from compressor.engine.plan import Plan, Prepared
from compressor.engine.task import Rank, Task
from compressor.errors import NumericalError
from compressor.formats import Form
from compressor.model import heap
from compressor.model.experts import ExpertLinear, seeing_all_tokens, stacked
from compressor.model.linear import Linear
from compressor.progress import Progress
from compressor.records.report import BlockRow
from compressor.stats import InputStats, all_finite, collecting

FEW_TOKENS = 64  # an expert with fewer of its own is calibrated on all tokens
_ERROR_BATCHES = 2  # batches whose dense outputs are kept to measure the error of a block
_GIVE_BACK = 1 << 23  # bytes of weights, after work on which freed memory goes back to the system


Store = Callable[[Task, Form, Seen | None], None]
"""Told of each finished linear: its task, the form it has now, what the calibration showed of it.
"""
Watch = Callable[[int, Batch, Tensor], None]
"""Told of each compressed block: its index, the first batch as it entered, the hidden states that
left.
"""


def unwatched(index: int, entering: Batch, leaving: Tensor) -> None:
    """Nothing."""


@dataclass(frozen=True)
class _Block:
    """A block that is loaded, and what all steps on it need.

    Attributes:
        plan: what to do.
        index: of the block; `tasks` are the plan's for it.
        module: the block itself, on `device`.
        states: calibration entering it; None where none is needed.
        arguments: what it is called with beside hidden states.
        sharing: the processes that hold other parts of the calibration.
        prepared: what the run has ready for the blocks.
        watch: told of the first batch.
        exact: outputs of the dense block, of the first batches.
    """

    plan: Plan
    index: int
    tasks: tuple[Task, ...]
    module: nn.Module
    states: States | None
    arguments: Arguments
    device: torch.device
    sharing: Group
    prepared: Prepared
    watch: Watch
    exact: list[Tensor] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Such as `model.layers.3`."""
        return f"{self.plan.skeleton.path}.{self.index}"


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
        block = _Block(
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


def _compress_block(block: _Block, store: Store, progress: Progress, group: Group) -> float | None:
    """Compress one block; returns the relative squared error of its output, None without
    calibration.
    """
    plan, tasks, states = block.plan, block.tasks, block.states
    if states and plan.tune:  # the targets of the tuning: the dense model on its own hidden states
        advance(states.dense, capture.through(block.module, block.arguments))
    owners = group.owners([_cost(plan, task) for task in tasks])
    own = [task for task, owner in zip(tasks, owners, strict=True) if owner == group.rank]
    inputs: dict[str, InputStats] = {}
    untuned: dict[str, Form] = {}
    compressed = group.shared(owners, _compressed(block, own, inputs), block.device)
    for number, (task, (form, seen)) in enumerate(zip(tasks, compressed, strict=True)):
        if plan.tune:
            untuned[task.linear.name] = form
        else:
            task.linear.set(form.dense())
            store(task, form, seen)
        losses = getattr(form, "losses", None)
        progress("linears", number + 1, len(tasks), linear=task.linear.name, losses=losses)
    if states and plan.tune:
        forms = _tune(block, untuned, states)
        for task in tasks:
            name, weight = task.linear.name, task.linear.read(plan.reader).to(block.device)
            form, seen = finish(plan, task, weight, forms[name], inputs.get(name))
            task.linear.set(form.dense())  # compute with what is stored from now on
            store(task, form, seen)
    return _advance(block, states) if states else None


def _cost(plan: Plan, task: Task) -> int:
    """About what compressing a linear takes, to share the linears out among processes."""
    rows, columns = task.linear.shape
    return rows * columns ** (2 if plan.needs_gram else 1)


def _routing(block: _Block) -> AbstractContextManager[None]:
    """Which tokens reach the experts of a block while they are observed."""
    return seeing_all_tokens(block.module) if block.plan.all_tokens else nullcontext()


def _groups(block: _Block, own: list[Task]) -> list[list[Task]]:
    """The linears `own` of this process, in the groups that are observed together."""
    room = block.prepared.gram_room
    if block.states is None or not block.plan.needs_gram or room is None:
        return [own]
    if sum(map(gram_bytes, own)) <= room:
        return [own]
    modules = {task.linear.name: task.linear.module for task in own}
    with _routing(block), collecting(modules) as stats:  # which of them read the same tensor
        capture.run(block.module, block.states.hidden[0], block.arguments)
    return in_groups(own, room, {name: id(inputs) for name, inputs in stats.items()})


def _compressed(
    block: _Block, own: list[Task], inputs: dict[str, InputStats]
) -> Iterator[Compressed]:
    """What becomes of each linear of this process; before the tuning, where there is one.

    One by one, or all at the end where they are observed in several groups: the block has to stay
    dense meanwhile.

    Args:
        block: whose linears they are.
        own: the tasks of this process.
        inputs: gets the statistics that the tuning needs, without their Gram matrices.
    """
    plan, groups = block.plan, _groups(block, own)
    waiting: list[Compressed] = []
    worked_on = 0
    for tasks in groups:
        stats = _observe(block, block.tasks if plan.splits_batches else tasks)
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
            used.gram = None
        if plan.tune:
            inputs |= stats
    yield from waiting


def _collecting(
    block: _Block, linears: Sequence[Linear]
) -> AbstractContextManager[dict[str, InputStats]]:
    """Collects what the plan needs of the inputs of `linears`."""
    plan = block.plan
    return collecting(
        {linear.name: linear.module for linear in linears},
        gram=plan.needs_gram,
        moments=plan.needs_moments,
        parts=block.sharing.size > 1,
    )


def _observe(block: _Block, tasks: Sequence[Task]) -> dict[str, InputStats]:
    """Statistics of the inputs of the tasks' linears, by name; the first call adds the outputs of
    the first batches to `block.exact`.
    """
    states, plan = block.states, block.plan
    if states is None:
        return {}
    linears = [task.linear for task in tasks]
    with _routing(block), _collecting(block, linears) as stats, sparing_last(linears) as last:
        for batch in states.hidden:
            number = batch.number
            wanted = number == len(block.exact) and number + states.offset < _ERROR_BATCHES
            last.begin(spare=not wanted)
            leaving = capture.run(block.module, batch, block.arguments)
            if wanted:
                block.exact.append(leaving.hidden)
    stats = block.sharing.merged(stats, block.device)
    return stats if plan.all_tokens else stats | _observe_idle(block, states, tasks, stats)


def _observe_idle(
    block: _Block, states: States, tasks: Sequence[Task], routed: Mapping[str, InputStats]
) -> dict[str, InputStats]:
    """Statistics of all tokens for the experts that hardly a token was routed to."""
    enough = {name for name, inputs in routed.items() if inputs.tokens >= FEW_TOKENS}
    idle = [task.linear for task in tasks if task.linear.experts and task.linear.name not in enough]
    if not idle:
        return {}
    with seeing_all_tokens(block.module), _collecting(block, idle) as stats:
        for batch in states.hidden:
            capture.run(block.module, batch, block.arguments)
    stats = block.sharing.merged(stats, block.device)
    for inputs in stats.values():
        inputs.note = f"fewer than {FEW_TOKENS} tokens were routed to it: calibrated on all"
    return stats


def _form(block: _Block, task: Task, weight: Tensor, stats: InputStats | None) -> Form:
    """The form of `weight` `[out, in]`, refined if asked."""
    if block.plan.needs_inputs:
        (stats or InputStats(1)).check(task.linear.name)
    factors = block.prepared.factors
    if factors and task.needs_gradients and isinstance(task.target, Rank):
        return factors.of(task.linear.name, task.target, weight.device)
    return compress_weight(block.plan, task, weight, stats)


def _tune(block: _Block, forms: Mapping[str, Form], states: States) -> dict[str, Form]:
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
        forms,
        states.hidden,
        states.dense,
        block.arguments,
        place=place,
        epochs=block.plan.tune,
        seed=block.plan.seed,
    )
    return tuned


def _advance(block: _Block, states: States) -> float:
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
