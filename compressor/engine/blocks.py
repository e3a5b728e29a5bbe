"""The loop over the blocks: statistics, compression, the inputs of the next block. Nothing is
written here.

For each block: load it, run the calibration states through it and collect statistics, compress its
linears, tune it if asked, run the states through the compressed block to get the inputs of the
next, free it. Peak memory is one block, the calibration states and the statistics of one block;
where its Gram matrices would not fit, the linears are taken group by group, with a pass through the
block, still dense, for each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from compressor.calibration import capture
from compressor.calibration.capture import States
from compressor.calibration.hidden_states import advance
from compressor.engine.block_tuning import tune
from compressor.engine.distributed import ALONE, Group
from compressor.engine.memory import gram_bytes, in_groups
from compressor.engine.task import Job, Task
from compressor.errors import about
from compressor.formats import Form
from compressor.formats.dense import Dense
from compressor.formats.sparse24 import Sparse24
from compressor.model.experts import ExpertLinear, seeing_all_tokens, stacked
from compressor.progress import Progress
from compressor.records.report import BlockRow
from compressor.stats import InputStats, collecting, output_error

FEW_TOKENS = 64  # an expert with fewer of its own is calibrated on all tokens
_ERROR_BATCHES = 4  # batches whose dense outputs are kept to measure the error of a block


@dataclass(frozen=True)
class Seen:
    """What the calibration showed of a linear.

    Attributes:
        tokens: of its input.
        error: of its output, as `output_error` measures it.
        note: what the report says of its input, if anything.
    """

    tokens: int
    error: float
    note: str


Made = tuple[Form, Seen | None]
"""What became of a linear; nothing was seen where there is no calibration."""

Store = Callable[[Task, Form, Seen | None], None]
"""Told of each finished linear: its task, the form it has now, what the calibration showed of it.
"""


def compress_blocks(
    job: Job,
    states: States | None,
    device: torch.device,
    store: Store,
    progress: Progress,
    *,
    first: int = 0,
    group: Group = ALONE,
) -> Iterator[BlockRow]:
    """Compress block after block; yields the row of each once `store` has been told of its linears.

    Args:
        job: what to do.
        states: calibration on entering block `first`, run through the compressed blocks in place;
            None where none is needed.
        device: where the blocks are computed.
        store: told of each finished linear.
        progress: told after each linear.
        first: the block to begin with.
        group: the processes that share the work; `store` is told in the first of them.
    """
    for index in range(first, len(job.tasks)):
        yield BlockRow(index, _compress_block(job, index, states, device, store, progress, group))


def dense_blocks(
    job: Job, states: States, device: torch.device, *, gram: bool = False
) -> Iterator[tuple[list[Task], dict[str, InputStats]]]:
    """Each block of the dense model, loaded meanwhile: its tasks and, by linear, the statistics of
    their inputs.

    Args:
        job: its tasks' linears are observed.
        states: calibration on entering block 0, left as it is.
        device: where the blocks are computed.
        gram: whether the statistics need the Gram matrix.

    Raises:
        NumericalError: a linear saw no tokens, or others than finite ones.
    """
    hidden = list(states.hidden)
    for index, tasks in enumerate(job.tasks):
        block = job.skeleton.load_block(index, device)
        with collecting(
            {task.linear.name: task.linear.module for task in tasks}, gram=gram
        ) as stats:
            hidden = [capture.run(block, batch, states.arguments[index]) for batch in hidden]
        for task in tasks:
            (stats.get(task.linear.name) or InputStats(1)).check(task.linear.name)
        yield tasks, stats
        job.skeleton.free_block(index)


def _compress_block(
    job: Job,
    index: int,
    states: States | None,
    device: torch.device,
    store: Store,
    progress: Progress,
    group: Group,
) -> float | None:
    """Compress one block; returns the relative squared error of its output, None without
    calibration.
    """
    block, tasks = job.skeleton.load_block(index, device), job.tasks[index]
    arguments = states.arguments[index] if states else ((), {})
    if (
        states and job.tune
    ):  # what the dense model makes of its own hidden states: the target of the tuning
        advance(states.dense, lambda _, hidden: capture.run(block, hidden, arguments))
    exact: list[Tensor] = []
    inputs: dict[str, InputStats] = {}
    forms: dict[str, Form] = {}  # those of a block that is still to be tuned
    sharing = (
        group if job.splits_batches else ALONE
    )  # those that have other parts of the calibration
    observe = partial(_observe, job, block, states, arguments, device, sharing, exact)
    owners = group.owners([_cost(job, task) for task in tasks])
    own = [task for task, owner in zip(tasks, owners, strict=True) if owner == group.rank]
    groups = _groups(job, own, block, states, arguments) if states else [own]
    made = group.shared(owners, _made(job, tasks, groups, observe, inputs, device), device)
    for number, (task, (form, seen)) in enumerate(zip(tasks, made, strict=True)):
        if job.tune:
            forms[task.linear.name] = form
        else:
            task.linear.set(form.dense())
            if group.first:
                store(task, form, seen)
        progress(
            "linears",
            number + 1,
            len(tasks),
            linear=task.linear.name,
            losses=getattr(form, "losses", None),
        )
    if states and job.tune:
        forms = _tune(job, index, tasks, block, forms, states, arguments)
        for task in tasks:
            form = _packed(job, task, forms[task.linear.name])
            task.linear.set(form.dense())  # compute with what is stored from now on
            store(
                task,
                form,
                _seen(task.linear.read(job.reader).to(device), form, inputs.get(task.linear.name)),
            )
    error = _advance(block, states, arguments, exact, sharing) if states else None
    job.skeleton.free_block(index)
    return error


def _cost(job: Job, task: Task) -> int:
    """About what compressing a linear takes, to share the linears out among processes."""
    rows, columns = task.linear.shape
    return rows * columns ** (2 if job.needs_gram else 1)


def _groups(
    job: Job, own: list[Task], block: nn.Module, states: States, arguments: Any
) -> list[list[Task]]:
    """The linears `own` of this process, in the groups that are observed together."""
    room = job.gram_room
    if not job.needs_gram or room is None or sum(map(gram_bytes, own)) <= room:
        return [own]
    with (
        _routing(job, block),
        collecting({task.linear.name: task.linear.module for task in own}) as stats,
    ):
        capture.run(block, states.hidden[0], arguments)  # which of them read the same tensor
    return in_groups(own, room, {name: id(inputs) for name, inputs in stats.items()})


def _routing(job: Job, block: nn.Module) -> AbstractContextManager[None]:
    """Which tokens reach the experts of `block` while they are observed."""
    return seeing_all_tokens(block) if job.all_tokens else nullcontext()


def _made(
    job: Job,
    tasks: list[Task],
    groups: list[list[Task]],
    observe: Callable[[list[Task]], dict[str, InputStats]],
    inputs: dict[str, InputStats],
    device: torch.device,
) -> Iterator[Made]:
    """What becomes of each linear of this process, in `groups`; before the tuning, where there is
    one.

    One by one, or all at the end where there are several groups: the block has to stay dense while
        they are observed.
    `inputs` gets the statistics that are still of use, without their Gram matrices.
    """
    waiting: list[Made] = []
    for part in groups:
        stats = observe(tasks if job.splits_batches else part)
        for task in part:
            weight = task.linear.read(job.reader).to(device)
            form, seen = _compress(job, task, weight, stats.get(task.linear.name)), None
            if not job.tune:
                form = _packed(job, task, form)
                seen = _seen(weight, form, stats.get(task.linear.name))
            if len(groups) == 1:
                yield form, seen
            else:
                waiting.append((form, seen))
        for used in stats.values():
            used.gram = None
        if job.tune:
            inputs |= stats
    yield from waiting


def _seen(weight: Tensor, form: Form, stats: InputStats | None) -> Seen | None:
    return (
        Seen(stats.tokens, output_error(weight, form.dense(), stats), stats.note) if stats else None
    )


def _observe(
    job: Job,
    block: nn.Module,
    states: States | None,
    arguments: Any,
    device: torch.device,
    group: Group,
    exact: list[Tensor],
    tasks: list[Task],
) -> dict[str, InputStats]:
    """Statistics of the inputs of the tasks' linears, by name; the first call adds the outputs of
    the first batches to `exact`.
    """
    if states is None:
        return {}
    modules, parts = {task.linear.name: task.linear.module for task in tasks}, group.size > 1
    with _routing(job, block), collecting(modules, gram=job.needs_gram, parts=parts) as stats:
        for number, hidden in enumerate(states.hidden):
            output = capture.run(block, hidden, arguments)
            if number == len(exact) and number + states.offset < _ERROR_BATCHES:
                exact.append(output)
    stats = group.merged(stats, device)
    enough = {name for name, inputs in stats.items() if inputs.tokens >= FEW_TOKENS}
    idle = {
        task.linear.name: task.linear.module
        for task in tasks
        if task.linear.experts and task.linear.name not in enough
    }
    if (
        idle and not job.all_tokens
    ):  # experts that hardly a token was routed to: what they would make of all of them
        with seeing_all_tokens(block), collecting(idle, gram=job.needs_gram, parts=parts) as more:
            for hidden in states.hidden:
                capture.run(block, hidden, arguments)
        more = group.merged(more, device)
        for inputs in more.values():
            inputs.note = f"fewer than {FEW_TOKENS} tokens were routed to it: calibrated on all"
        stats |= more
    return stats


def _compress(job: Job, task: Task, weight: Tensor, stats: InputStats | None) -> Form:
    """The form of `weight` `[out, in]`, refined if asked."""
    if job.needs_inputs:
        (stats or InputStats(1)).check(task.linear.name)
    if job.factored and isinstance(task.goal, int) and task.needs_gradients:
        return job.factored.of(task.linear.name, task.goal, weight.device)
    with about(task.linear.name):
        form: Form = task.method.compress(weight, stats, task.goal, **task.options)
        if job.refine and task.refined:
            form = Dense(
                job.refine.refine(weight, form.dense(), stats, task.goal, **job.refine_options)
            )
    return form


def _packed(job: Job, task: Task, form: Form) -> Form:
    """The form a linear is stored in: packed where it can be."""
    return Sparse24.from_dense(form.weight) if isinstance(form, Dense) and job.packs(task) else form


def _tune(
    job: Job,
    index: int,
    tasks: list[Task],
    block: nn.Module,
    forms: Mapping[str, Form],
    states: States,
    arguments: Any,
) -> dict[str, Form]:
    """The forms of a block's linears, trained together."""
    prefix = f"{job.skeleton.path}.{index}."

    def place(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        placed: dict[str, Tensor] = {}
        stacks: dict[str, list[tuple[ExpertLinear, Tensor]]] = {}
        for linear in (task.linear for task in tasks):
            weight = weights[linear.name].T if linear.transposed else weights[linear.name]
            name = linear.parameter.removeprefix(prefix)
            if linear.experts:
                stacks.setdefault(name, []).append((linear.module, weight))
            else:
                placed[name] = weight
        return placed | {name: stacked(parts) for name, parts in stacks.items()}

    tuned, _, _ = tune(
        block,
        forms,
        states.hidden,
        states.dense,
        arguments,
        place=place,
        epochs=job.tune,
        seed=job.seed,
    )
    return tuned


def _advance(
    block: nn.Module, states: States, arguments: Any, exact: list[Tensor], sharing: Group
) -> float:
    """Run the states through the compressed block, in place; returns the error against the `exact`
    outputs.
    """
    errors: list[tuple[float, float]] = []

    def step(number: int, hidden: Tensor) -> Tensor:
        output = capture.run(block, hidden, arguments)
        if number < len(exact):
            difference = (output - exact[number]).double().square().sum().item()
            errors.append((difference, exact[number].double().square().sum().item()))
        return output

    advance(states.hidden, step)
    everywhere = sharing.joined(errors)
    return sum(difference for difference, _ in everywhere) / max(
        sum(total for _, total in everywhere), 1e-300
    )
