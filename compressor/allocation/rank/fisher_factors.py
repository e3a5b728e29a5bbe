"""What a weight change costs the loss, as a product of two small matrices, and the factors of every
linear in that metric.

To second order the loss rises by ½ Σ_t (g_tᵀ ΔW x_t)² = ½ vec(ΔW)ᵀ F vec(ΔW), x_t the input of a
linear at token t, g_t the gradient at its output, F = Σ_t (g_t ⊗ x_t)(g_t ⊗ x_t)ᵀ the empirical
Fisher information. Its marginals over the two sides are

    A = Σ_t ‖g_t‖² x_t x_tᵀ      B = Σ_t ‖x_t‖² g_t g_tᵀ      and      F ≈ B ⊗ A / tr F

which is exact where F is such a product. K-FAC (Martens and Grosse 2015,
https://arxiv.org/abs/1503.05671) takes Σ x xᵀ and Σ g gᵀ, for which ‖x_t‖ and ‖g_t‖ have to be
independent: they are not, most tokens have next to no gradient.

The pass runs in float32, on the dense model, and factors each linear while its block is there. The
factors are spilled to disk, one file a block, columns by descending singular value: those of any
lower rank are the first columns.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from compressor.allocation.rank import Spectrum, largest_rank
from compressor.calibration.capture import States
from compressor.calibration.float32 import check_seen, in_float32
from compressor.calibration.gradients import Taps, backward_blocks
from compressor.engine.factor_store import Factored
from compressor.engine.task import Job, Task
from compressor.errors import about
from compressor.formats.lowrank import LowRank
from compressor.progress import Progress

TOKENS = 32_768  # of the calibration, if there are so many


def factor_all(
    job: Job, states: States, device: torch.device, folder: Path, progress: Progress
) -> tuple[Factored, dict[str, Spectrum]]:
    """One pass over the calibration; gives the factors of every linear whose method needs
    gradients, and its singular values.

    Args:
        job: with `keep` a linear is factored to the largest rank that pays, else to that of its
            goal.
        states: calibration on entering block 0, left as it is.
        device: where blocks are computed.
        folder: for the files; it exists.
        progress: told of every block.
    """
    skeleton, part = in_float32(job.skeleton, states, TOKENS, device)
    found, spectra = Factored(folder), {}
    for done, (index, taps) in enumerate(backward_blocks(skeleton, part, device)):
        forms = {}
        for task in job.tasks[index]:
            if task.needs_gradients:
                name = task.linear.name
                forms[name], values = _factor(job, task, taps.pop(name), device)
                spectra[name] = Spectrum(task.linear.shape, values.cpu())
        found.keep(index, forms)
        progress("gradients", done + 1, len(job.tasks))
    return found, spectra


def marginals(tap: Taps) -> tuple[Tensor, Tensor]:
    """A `[in, in]` and B `[out, out]` of what went through one linear, float32."""
    first, gradient = tap.inputs[0], tap.gradients[0]
    a = torch.zeros(first.shape[-1], first.shape[-1], device=first.device)
    b = torch.zeros(gradient.shape[-1], gradient.shape[-1], device=first.device)
    for x, g in zip(tap.inputs, tap.gradients, strict=True):
        inputs = x.float() * g.float().norm(dim=1, keepdim=True)
        outputs = g.float() * x.float().norm(dim=1, keepdim=True)
        a.addmm_(inputs.T, inputs)
        b.addmm_(outputs.T, outputs)
    return a, b


def _factor(job: Job, task: Task, tap: Taps, device: torch.device) -> tuple[LowRank, Tensor]:
    check_seen(task.linear.name, tap)
    rank = max(1, largest_rank(task.linear.shape)) if job.keep else task.goal
    with about(task.linear.name):
        return task.method.decompose(
            task.linear.read(job.reader).to(device), rank, *marginals(tap), **task.options
        )
