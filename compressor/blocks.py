"""The loop over the blocks: statistics, compression, the inputs of the next block. Nothing is written here.

For each block: load it, run the calibration states through it and collect statistics, compress its linears, tune it if
asked, run the states through the compressed block to get the inputs of the next, free it.
Peak memory is one block, the calibration states and the statistics of one block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from compressor import calibration
from compressor.calibration import States
from compressor.errors import NumericalError
from compressor.formats import Form
from compressor.formats.dense import Dense
from compressor.formats.sparse24 import Sparse24
from compressor.job import Job, Task
from compressor.pattern import Pattern
from compressor.refine.tune import tune
from compressor.report import BlockRow
from compressor.stats import InputStats, collecting

_ERROR_BATCHES = 4  # batches whose dense outputs are kept to measure the error of a block

Store = Callable[[Task, Tensor, Form, InputStats | None], None]
"""Told of each finished linear: its task, the weight it had, the form it has now, the statistics of its inputs."""


class Progress(Protocol):
    """Told after each step: its name, how many are done of how many, and what is finished: a block's row, or a linear's
    name with what its method says of it."""

    def __call__(
        self, step: str, done: int, total: int, block: BlockRow | None = None, linear: str = "", notes: Mapping[str, Any] | None = None
    ) -> None:
        """Called after each step."""
        ...


def silent(*_: Any, **__: Any) -> None:
    """A Progress that says nothing."""


def compress_blocks(job: Job, states: States | None, device: torch.device, store: Store, progress: Progress) -> Iterator[BlockRow]:
    """Compress block after block; yields the row of each once `store` has been told of its linears.

    Args:
        job: what to do.
        states: calibration on entering block 0, run through the compressed blocks in place; None where none is needed.
        device: where the blocks are computed.
        store: told of each finished linear.
        progress: told after each linear.
    """
    for index in range(len(job.tasks)):
        yield BlockRow(index, _compress_block(job, index, states, device, store, progress))


def _compress_block(
    job: Job, index: int, states: States | None, device: torch.device, store: Store, progress: Progress
) -> float | None:
    """Compress one block; returns the relative squared error of its output, None without calibration."""
    block, tasks = job.skeleton.load_block(index, device), job.tasks[index]
    arguments = states.arguments[index] if states else ((), {})
    exact: list[Tensor] = []
    hooked = (
        collecting({task.linear.name: task.linear.module for task in tasks}, gram=job.needs_gram) if states else nullcontext({})
    )
    with hooked as stats:
        for number, hidden in enumerate(states.hidden if states else []):
            output = calibration.run(block, hidden, arguments)
            if number < _ERROR_BATCHES:
                exact.append(output)
    if states and job.tune:  # what the dense model makes of its own hidden states: the target of the tuning
        states.dense = [calibration.run(block, hidden, arguments) for hidden in states.dense]
    for number, task in enumerate(tasks):
        weight, own = task.linear.read(job.reader).to(device), stats.get(task.linear.name)
        form = _compress(job, task, weight, own)
        task.linear.set(form.dense())
        if not job.tune:
            _finish(job, task, weight, form, own, store)
        progress("linears", number + 1, len(tasks), linear=task.linear.name, notes=getattr(form, "notes", None))
    if states and job.tune:
        _tune(job, tasks, block, states, arguments)
        for task in tasks:
            weight = task.linear.read(job.reader).to(device)
            _finish(job, task, weight, Dense(task.linear.get().to(weight.dtype)), stats.get(task.linear.name), store)
    error = _advance(block, states, arguments, exact) if states else None
    job.skeleton.free_block(index)
    return error


def _compress(job: Job, task: Task, weight: Tensor, stats: InputStats | None) -> Form:
    """The form of `weight` `[out, in]`, refined if asked."""
    if job.needs_inputs:
        (stats or InputStats(1)).check(task.linear.name)
    try:
        form: Form = task.method.compress(weight, stats, task.goal, **task.options)
        if job.refine:
            form = Dense(job.refine.refine(weight, form.dense(), stats, task.goal, **job.refine_options))
    except NumericalError as error:
        raise NumericalError(f"{task.linear.name}: {error}") from None
    return form


def _finish(job: Job, task: Task, weight: Tensor, form: Form, stats: InputStats | None, store: Store) -> None:
    """Pack the linear where it can be, compute with what is stored from now on, and tell `store`."""
    if job.packed and isinstance(form, Dense) and isinstance(task.goal, Pattern) and task.goal.fits_2_4:
        form = Sparse24.from_dense(form.weight)
    task.linear.set(form.dense())
    store(task, weight, form, stats)


def _tune(job: Job, tasks: list[Task], block: nn.Module, states: States, arguments: Any) -> None:
    """Train the kept weights of a block."""
    weights: Mapping[str, nn.Parameter] = {task.linear.name: task.linear.module.weight for task in tasks}
    tune(block, weights, states.hidden, states.dense, arguments, epochs=job.tune, seed=job.seed)


def _advance(block: nn.Module, states: States, arguments: Any, exact: list[Tensor]) -> float:
    """Run the states through the compressed block, in place; returns the error against the `exact` outputs."""
    difference = total = 0.0
    for number, hidden in enumerate(states.hidden):
        output = calibration.run(block, hidden, arguments)
        if number < len(exact):
            difference += (output - exact[number]).double().square().sum().item()
            total += exact[number].double().square().sum().item()
        states.hidden[number] = output
    return difference / max(total, 1e-300)
