"""What a weight change costs the loss, as a product of two small matrices, and the factors of every
linear in that metric.

To second order the loss rises by ½ Σ_t (g_tᵀ ΔW x_t)² = ½ vec(ΔW)ᵀ F vec(ΔW), x_t the input of a
linear at token t, g_t the gradient at its output, F = Σ_t (g_t ⊗ x_t)(g_t ⊗ x_t)ᵀ the empirical
Fisher information. Its nearest Kronecker product, after one step of the power method, has the
factors

    A = Σ_t ‖g_t‖² x_t x_tᵀ      B = Σ_t ‖x_t‖² g_t g_tᵀ      and      F ≈ B ⊗ A / tr F

which is exact where F is such a product. K-FAC (Martens and Grosse 2015,
https://arxiv.org/abs/1503.05671) takes Σ x xᵀ and Σ g gᵀ, for which ‖x_t‖ and ‖g_t‖ have to be
independent: they are not, most tokens have next to no gradient.

The pass runs in float32, on the dense model, and factors each linear while its block is there. The
factors are spilled to disk, one file a block, columns by descending singular value: those of any
lower rank are the first columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compressor.allocation.rank import largest_rank
from compressor.calibration.capture import States
from compressor.calibration.float32 import check_seen, in_float32
from compressor.calibration.gradients import Taps, backward_blocks
from compressor.engine.factor_store import Factored
from compressor.engine.plan import Plan
from compressor.engine.task import Task
from compressor.errors import about
from compressor.methods.factor import UNUSED, Factors
from compressor.progress import Progress

TOKENS = 32_768  # of the calibration, if there are so many


def factor_all(
    plan: Plan, states: States, device: torch.device, factors: Factored, progress: Progress
) -> None:
    """One pass over the calibration: the factors of every linear whose method needs gradients, and
    its singular values, go into `factors`.

    A linear that no gradient reaches (what follows it is zero) is factored by its inputs alone, one
    whose inputs are zero by its weight alone: neither can move the loss, so their singular values
    are zero, and a note says so.

    Args:
        plan: a linear without a target is factored to the largest rank that pays, else to that of
            its target.
        states: calibration on entering block 0, left as it is.
        device: where blocks are computed.
        factors: what they are kept in.
        progress: told of every block.
    """
    skeleton, part = in_float32(plan.skeleton, states, TOKENS, device)
    factors.begin()
    for done, (index, taps) in enumerate(backward_blocks(skeleton, part, device)):
        linears, values = {}, {}
        for task in plan.tasks[index]:
            if task.needs_gradients:
                name = task.linear.name
                linears[name], values[name] = _factor(plan, task, taps.pop(name), device)
        factors.keep(index, linears, values)
        progress("gradients", done + 1, len(plan.tasks))


def kronecker_factors(tap: Taps) -> tuple[Tensor, Tensor]:
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


def _factor(
    plan: Plan, task: Task, tap: Taps, device: torch.device
) -> tuple[tuple[Factors, str], Tensor]:
    """The factors of one linear in its dtype and the note on them, and its singular values in units
    of the loss.
    """
    check_seen(task.linear.name, tap)
    largest = max(1, largest_rank(task.linear.shape))
    rank = largest if task.target is None else task.target
    weight = task.linear.read(plan.reader).to(device)
    inputs, outputs = kronecker_factors(tap)
    note = ""
    if not bool(inputs.any()):
        inputs, outputs, note = _without_gradient(tap, outputs)
    with about(task.linear.name):
        factors, values = task.method.decompose(weight, rank, inputs, outputs, **task.options)
    kept = factors.to(weight.dtype), note
    return kept, values.new_zeros(len(values)) if note else values


def _without_gradient(tap: Taps, outputs: Tensor) -> tuple[Tensor, Tensor, str]:
    """What takes the place of A and B where both are zero, and what the report says of it."""
    identity = torch.eye(len(outputs), device=outputs.device)
    gram = sum(x.float().T @ x.float() for x in tap.inputs)
    assert isinstance(gram, Tensor)
    if bool(gram.any()):
        return gram, identity, "no gradient of the loss reaches it: factored by its inputs alone"
    return torch.eye(len(gram), device=gram.device), identity, UNUSED
