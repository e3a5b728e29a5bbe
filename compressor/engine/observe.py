"""What the calibration shows of the inputs of a block's linears."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

from compressor.calibration import capture
from compressor.calibration.capture import States
from compressor.calibration.last_linear import sparing_last
from compressor.engine.loaded_block import LoadedBlock
from compressor.engine.memory import gram_bytes, in_groups
from compressor.engine.task import Task
from compressor.model.experts import seeing_all_tokens
from compressor.model.linear import Linear
from compressor.stats import SAMPLE_TOKENS, InputStats, collecting

FEW_TOKENS = 64  # an expert with fewer of its own is calibrated on all tokens
ERROR_BATCHES = 2  # batches whose dense outputs are kept to measure the error of a block


def _routing(block: LoadedBlock) -> AbstractContextManager[None]:
    """Which tokens reach the experts of a block while they are observed."""
    return seeing_all_tokens(block.module) if block.plan.all_tokens else nullcontext()


def in_room(block: LoadedBlock, own: list[Task]) -> list[list[Task]]:
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


def _collecting(
    block: LoadedBlock, linears: Sequence[Linear]
) -> AbstractContextManager[dict[str, InputStats]]:
    """Collects what the plan needs of the inputs of `linears`."""
    plan = block.plan
    return collecting(
        {linear.name: linear.module for linear in linears},
        gram=plan.needs_gram,
        moments=plan.needs_moments,
        parts=block.sharing.size > 1,
    )


def observe(block: LoadedBlock, tasks: Sequence[Task]) -> dict[str, InputStats]:
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
            wanted = number == len(block.exact) and number + states.offset < ERROR_BATCHES
            last.begin(spare=not wanted)
            leaving = capture.run(block.module, batch, block.arguments)
            if wanted:
                block.exact.append(leaving.hidden)
    stats = block.sharing.merged(stats, block.device)
    if not plan.all_tokens:
        stats |= _observe_idle(block, states, tasks, stats)
    if states.held_out:
        _observe_held_out(block, states.held_out, linears, stats)
    return stats


def _observe_held_out(
    block: LoadedBlock,
    states: States,
    linears: Sequence[Linear],
    stats: Mapping[str, InputStats],
) -> None:
    """Give `stats` the inputs of `linears` on samples that are held out. Every process sees all of
    these: they are few.
    """
    if not any(linear.experts for linear in linears):
        states = states.at_least(SAMPLE_TOKENS)  # no more of them are kept
    modules = {linear.name: linear.module for linear in linears}
    with _routing(block), collecting(modules) as seen, sparing_last(linears) as last:
        for batch in states.hidden:
            last.begin(spare=True)
            capture.run(block.module, batch, states.arguments[block.index])
    for name, inputs in stats.items():
        if name in seen and inputs.held_out is None:
            inputs.held_out = seen[name].sample


def _observe_idle(
    block: LoadedBlock, states: States, tasks: Sequence[Task], routed: Mapping[str, InputStats]
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
