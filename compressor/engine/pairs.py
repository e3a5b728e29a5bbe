"""What linears read in two models at once: the one that is compressed so far, and the dense one.

Both differ by all that was compressed before, the linears before them in their own block among it.
So a block is gone through in stages: linears that read one tensor are observed, on the hidden
states of both models, and compressed before the next are looked at.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compressor.calibration import capture
from compressor.calibration.capture import States
from compressor.calibration.hidden_states import Batch
from compressor.calibration.last_linear import not_computed
from compressor.engine.loaded_block import LoadedBlock
from compressor.engine.observe import ERROR_BATCHES
from compressor.engine.task import Task
from compressor.errors import CheckpointError
from compressor.model.linear import Linear
from compressor.stats import SAMPLE_TOKENS, InputStats

UNMATCHED = "not matched: it does not read every token, and others in the dense model"
"""The note of a linear whose inputs in both models are no pairs: that of an expert."""


@dataclass(frozen=True)
class Stage:
    """Linears of a block that read the same tensors.

    Attributes:
        tasks: of the linears.
        idle: linears that a pass for what those read needs no product of.
    """

    tasks: list[Task]
    idle: list[Linear]


def stages(block: LoadedBlock) -> tuple[list[Stage], list[Task]]:
    """The stages of a block that is dense, in the order of its forward, and the tasks whose linears
    do not read every token; `block.exact` gets the outputs of the first batches.
    """
    assert block.states
    tasks = {task.linear.name: task for task in block.tasks}
    reads = _first_reads(block)
    for batch in block.states.hidden[1:ERROR_BATCHES]:
        block.exact.append(capture.run(block.module, batch, block.arguments).hidden)
    whole = block.states.ids[0].numel()
    groups: dict[tuple[int, ...], list[Task]] = {}
    for name, tensors in reads.items():
        if not tasks[name].linear.experts and all(x[..., 0].numel() == whole for x in tensors):
            groups.setdefault(tuple(map(id, tensors)), []).append(tasks[name])
    order, found = list(reads), list[Stage]()
    for tensors, own in groups.items():
        after = order[order.index(own[0].linear.name) :]
        once = len(tensors) == 1  # else a later linear may come before the last of them
        found.append(Stage(own, [tasks[name].linear for name in after] if once else []))
    paired = {task.linear.name for stage in found for task in stage.tasks}
    return found, [task for name, task in tasks.items() if name not in paired]


def _first_reads(block: LoadedBlock) -> dict[str, list[Tensor]]:
    """What each linear with a task reads of the first batch, in the order of the first calls; the
    output goes to `block.exact`.
    """
    assert block.states
    reads: dict[str, list[Tensor]] = {}

    def reading(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, args: reads.setdefault(name, []).append(args[0])

    linears = [task.linear for task in block.tasks]
    handles = [one.module.register_forward_pre_hook(reading(one.name)) for one in linears]
    try:
        leaving = capture.run(block.module, block.states.hidden[0], block.arguments)
    finally:
        for handle in handles:
            handle.remove()
    block.exact.append(leaving.hidden)
    return reads


def observe_pairs(block: LoadedBlock, stage: Stage) -> dict[str, InputStats]:
    """Statistics of what the linears of a stage read, by name: one for all, with `cross`.

    Raises:
        CheckpointError: they read more tokens in one model than in the other.
    """
    states, plan, linear = block.states, block.plan, stage.tasks[0].linear
    assert states
    stats = InputStats(
        linear.shape[1], gram=True, moments=plan.needs_moments, cross=True, device=block.device
    )
    with not_computed(stage.idle):
        for here, there in zip(states.hidden, states.dense, strict=True):
            x = _read(block, linear, here, states)
            with block.originals.in_place():
                dense = _read(block, linear, there, states)
            if x.shape != dense.shape:
                raise CheckpointError(
                    f"{linear.name} reads {len(dense)} tokens in the dense model and {len(x)} in "
                    f"the compressed one: `match` cannot pair them"
                )
            stats.update(x)
            stats.add_cross(x, dense)
        if states.held_out:
            held_out = states.held_out.at_least(SAMPLE_TOKENS)  # no more of them are kept
            stats.held_out = _sample(block, linear, held_out, dense=False)
            if held_out.dense:
                with block.originals.in_place():
                    stats.held_out_dense = _sample(block, linear, held_out, dense=True)
    return dict.fromkeys((task.linear.name for task in stage.tasks), stats)


def _sample(block: LoadedBlock, linear: Linear, states: States, *, dense: bool) -> Tensor:
    """The first tokens that a linear reads, `[<= 1024, in]`."""
    batches = states.dense if dense else states.hidden
    return torch.cat([_read(block, linear, each, states) for each in batches])[:SAMPLE_TOKENS]


def _read(block: LoadedBlock, linear: Linear, batch: Batch, states: States) -> Tensor:
    """What a linear of the block reads in a pass, `[tokens, in]`."""
    read: list[Tensor] = []
    handle = linear.module.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    try:
        capture.run(block.module, batch, states.arguments[block.index])
    finally:
        handle.remove()
    return torch.cat([x.reshape(-1, x.shape[-1]) for x in read])
