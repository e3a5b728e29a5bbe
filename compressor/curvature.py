"""Gram matrices of the gradients at the outputs of linears, B = Σ g gᵀ, from one streamed forward and backward pass.

Those of a block are spilled to disk as soon as they are there and read one by one when its linears are factored, so
that memory stays one block. The pass runs in float32, on the dense model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from compressor.blocks import Progress
from compressor.calibration import States
from compressor.gradients import Taps, backward_blocks
from compressor.job import Job, Task
from compressor.ratios.precise import check_seen, in_float32
from compressor.stats import InputStats

TOKENS = 32_768  # of the calibration, if there are so many

Seen = Callable[[Task, InputStats, Tensor], None]
"""Told of each linear: its task, the statistics of its inputs with the Gram matrix, the Gram matrix of its gradients."""


class GradientGrams:
    """Those of all linears of a job, in files of `folder`, one a block."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Path] = {}

    def keep(self, index: int, grams: dict[str, Tensor]) -> None:
        """Write those of block `index`, float32 `[out, out]` by the names of the linears."""
        path = self.folder / f"gradients-{index:05}.safetensors"
        save_file({name: gram.cpu().contiguous() for name, gram in grams.items()}, path)
        self._files |= dict.fromkeys(grams, path)

    def of(self, name: str, device: torch.device) -> Tensor:
        """That of the linear `name`."""
        with safe_open(self._files[name], framework="pt") as file:
            return file.get_tensor(name).to(device)


def measure(job: Job, states: States, device: torch.device, folder: Path, progress: Progress, seen: Seen) -> GradientGrams:
    """One pass over the calibration.

    Args:
        job: every task's linear is measured.
        states: calibration on entering block 0, left as it is.
        device: where blocks are computed.
        folder: for the files; it exists.
        progress: told of every block.
        seen: told of every linear.
    """
    skeleton, part = in_float32(job, states, TOKENS, device)
    found = GradientGrams(folder)
    for done, (index, taps) in enumerate(backward_blocks(skeleton, part, device)):
        grams: dict[str, Tensor] = {}
        for task, stats, gram in _grams(job.tasks[index], taps):
            seen(task, stats, gram)
            grams[task.linear.name] = gram
        found.keep(index, grams)
        progress("gradients", done + 1, len(job.tasks))
    return found


def _grams(tasks: list[Task], taps: dict[str, Taps]) -> Iterator[tuple[Task, InputStats, Tensor]]:
    shared: dict[int, InputStats] = {}  # linears that read one tensor
    for task in tasks:
        tap = taps[task.linear.name]
        check_seen(task.linear.name, tap)
        first = tap.inputs[0]
        if id(first) not in shared:
            shared[id(first)] = InputStats(first.shape[-1], gram=True, device=first.device)
            for rows in tap.inputs:
                shared[id(first)].update(rows)
        gram = torch.zeros(task.linear.shape[0], task.linear.shape[0], device=first.device)
        for rows in tap.gradients:
            gram.addmm_(rows.float().T, rows.float())
        yield task, shared[id(first)], gram
