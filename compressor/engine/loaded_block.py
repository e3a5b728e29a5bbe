"""A block that is loaded, and what all steps on it need."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from compressor.calibration.arguments import Arguments
from compressor.calibration.capture import States
from compressor.calibration.hidden_states import Batch
from compressor.engine.distributed import Group
from compressor.engine.plan import Plan, Prepared
from compressor.engine.task import Task
from compressor.formats import Form
from compressor.model.linear import Linear
from compressor.stats import InputStats

Watch = Callable[[int, Batch, Tensor], None]
"""Told of each compressed block: its index, the first batch as it entered, the hidden states that
left.
"""


class Originals:
    """Dense weights of the linears of a block that compute with compressed ones already."""

    def __init__(self) -> None:
        self._kept: list[tuple[nn.Parameter, Tensor]] = []

    def replace(self, linear: Linear, weight: Tensor) -> None:
        """Keep the weight of `linear`, no expert, and have it compute with `weight` `[out, in]`."""
        parameter = linear.module.weight
        self._kept.append((parameter, parameter.data))
        parameter.data = torch.empty_like(parameter.data)
        linear.set(weight)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside the `with`, the linears compute with what is kept here."""
        compressed = [parameter.data for parameter, _ in self._kept]
        for parameter, dense in self._kept:
            parameter.data = dense
        try:
            yield
        finally:
            for (parameter, _), data in zip(self._kept, compressed, strict=True):
                parameter.data = data

    def forget(self) -> None:
        """Keep none of them any longer."""
        self._kept.clear()


@dataclass(frozen=True)
class LoadedBlock:
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
        originals: dense weights of what is compressed, while a dense pass is still to come.
        untuned: forms that wait for the tuning, by the names of their linears.
        inputs: what the tuning needs of their inputs.
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
    originals: Originals = field(default_factory=Originals)
    untuned: dict[str, Form] = field(default_factory=dict)
    inputs: dict[str, InputStats] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Such as `model.layers.3`."""
        return f"{self.plan.skeleton.path}.{self.index}"
