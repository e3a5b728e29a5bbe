"""ECoFLaP: blocks whose gradients are large keep more (Sung et al. 2024,
https://arxiv.org/abs/2310.02998).

Coarse: a score for every group of linears, the zeros shared out by water-filling (waterfill.py).
Fine: the method prunes each linear to its share. Three scores of a linear, summed over a group; L_b
is the mean loss of batch b:

    first     mean_b ‖∂L_b/∂W‖_F, from gradients that are exact: two passes over the blocks, one in
              memory at a time
    product   Σ_ij |W_ij| · mean_b |∂L_b/∂W_ij|: what the authors' first-order scripts take
    zeroth    mean |L(W + εz) - L(W - εz)| / 2ε, z ~ N(0, 1): the paper's, forward passes only

|g · z| has the mean √(2/π) ‖g‖ and 0.756 of it as standard deviation, so `zeroth` estimates `first`
up to a constant, with a relative error of 0.756/√evaluations. All of it is computed in float32: in
bfloat16 the two losses differ by rounding alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from compressor.allocation.sparsity.groups import ceiling, groups, inside
from compressor.allocation.sparsity.waterfill import waterfill
from compressor.calibration import capture
from compressor.calibration.capture import States
from compressor.calibration.float32 import check_seen, in_float32
from compressor.calibration.gradients import Taps, backward_blocks, next_token_loss
from compressor.calibration.head import head
from compressor.calibration.hidden_states import Batch, Batches, advance
from compressor.engine.plan import Plan
from compressor.model.linear import Linear
from compressor.model.skeleton import Skeleton
from compressor.progress import Progress

NEEDS_INPUTS = True
# rank correlation of two halves of the evaluations below which zeroth-order scores are called noise
_STEADY = 0.5


def allocate(
    plan: Plan,
    zeros: int,
    states: States,
    device: torch.device,
    progress: Progress,
    *,
    score: str = "first",
    granularity: str = "block",
    max_sparsity: float = 0.0,
    tokens: int = 8192,
    evaluations: int = 4,
    epsilon: float = 1e-3,
) -> tuple[dict[str, int], dict[str, Any]]:
    """Zeros by the gradients of each group.

    Args:
        plan, zeros, states, device, progress: as compressor/allocation/sparsity/__init__.py says.
        score: `first`, `product` or `zeroth`.
        granularity: `block` or `linear`.
        max_sparsity: of a group; 0 for a tenth more than the sparsity of the whole, as published.
        tokens: calibration tokens the scores are made from.
        evaluations: of `zeroth`: draws of z for every linear; 4 as published (32 samples in batches
            of 8).
        epsilon: of `zeroth`.

    Raises:
        NumericalError: scores that are not finite, or all zero.
    """
    grouped = groups(plan, granularity)
    sizes = [sum(linear.size for linear in linears) for linears in grouped.values()]
    most = ceiling(max_sparsity, zeros, sum(sizes), zeros / sum(sizes) + 0.1)
    skeleton, part = in_float32(plan.skeleton, states, tokens, device)
    facts: dict[str, Any] = {"score": score}
    if score == "zeroth":
        halves = zeroth_order(plan, skeleton, part, device, progress, evaluations, epsilon)
        scores = {name: sum(both) / evaluations for name, both in halves.items()}
        facts |= _steadiness(halves, evaluations)
    else:
        scores = first_order(plan, skeleton, part, device, progress, weighted=score == "product")
    summed = [sum(scores[linear.name] for linear in linears) for linears in grouped.values()]
    kept = waterfill(sizes, summed, sum(sizes) - zeros, most)
    counts = [size - keep for size, keep in zip(sizes, kept, strict=True)]
    return inside(grouped, counts), facts | {"scores": scores}


def first_order(
    plan: Plan,
    skeleton: Skeleton,
    states: States,
    device: torch.device,
    progress: Progress,
    *,
    weighted: bool = False,
) -> dict[str, float]:
    """Score of every linear from exact gradients; `weighted` is the `product` of the module's
    docstring.
    """
    scores: dict[str, float] = {}
    for done, (index, taps) in enumerate(backward_blocks(skeleton, states, device)):
        for task in plan.tasks[index]:
            tap = taps[task.linear.name]
            check_seen(task.linear.name, tap)
            if weighted:
                gradient = sum(
                    (g.abs() for g in _batch_gradients(tap)),
                    torch.zeros(task.linear.shape, device=device),
                )
                total = (
                    (task.linear.read(plan.reader).to(device).float().abs() * gradient)
                    .sum(dtype=torch.float64)
                    .item()
                )
            else:
                total = sum(g.norm().item() for g in _batch_gradients(tap))
            scores[task.linear.name] = total / len(tap.inputs)
        progress("gradients", done + 1, len(plan.tasks))
    return scores


def _batch_gradients(tap: Taps) -> Iterator[Tensor]:
    """∂L_b/∂W `[out, in]` of every batch, of the loss per token; one in memory at a time."""
    return (g.T @ x / len(x) for x, g in zip(tap.inputs, tap.gradients, strict=True))


@torch.no_grad()
def zeroth_order(
    plan: Plan,
    skeleton: Skeleton,
    states: States,
    device: torch.device,
    progress: Progress,
    evaluations: int,
    epsilon: float,
) -> dict[str, tuple[float, float]]:
    """Σ |L(W + εz) - L(W - εz)| / 2ε of every linear, over the even and over the odd evaluations.

    A block is loaded, each of its linears moved there and back for every evaluation, and what
    leaves the block taken through the blocks after it: the passes through the blocks before it are
    made once. z comes from a generator of its own on the CPU.
    """
    generator = torch.Generator().manual_seed(plan.seed)
    hidden = states.entering()
    scores: dict[str, tuple[float, float]] = {}
    for index, tasks in enumerate(plan.tasks):
        block, arguments = skeleton.load_block(index, device), states.arguments[index]
        names = {task.linear.name for task in tasks}
        linears = [linear for linear in skeleton.linears(index) if linear.name in names]
        moved = states.room()
        for linear in linears:
            for evaluation in range(evaluations):
                batch = hidden[evaluation % len(hidden)]
                for _ in there_and_back(linear, epsilon, generator):
                    moved.append(capture.run(block, batch, arguments))
        advance(hidden, capture.through(block, arguments))
        skeleton.free_block(index)
        losses = _losses(skeleton, states, moved, index + 1, device)
        slopes = (losses[0::2] - losses[1::2]).abs().reshape(len(linears), evaluations) / (
            2 * epsilon
        )
        for linear, row in zip(linears, slopes, strict=True):
            scores[linear.name] = (row[0::2].sum().item(), row[1::2].sum().item())
        progress("zeroth-order scores", index + 1, len(plan.tasks))
    return scores


def there_and_back(linear: Linear, epsilon: float, generator: torch.Generator) -> Iterator[None]:
    """Two steps: W + εz, W - εz with one z; then W again, bit for bit: a copy of it, not the sum
    taken back.
    """
    weight = linear.get().clone()
    step = epsilon * torch.randn(weight.shape, generator=generator).to(weight)
    try:
        for moved in (weight + step, weight - step):
            linear.set(moved)
            yield
    finally:
        linear.set(weight)


def _losses(
    skeleton: Skeleton,
    states: States,
    moved: list[Batch] | Batches,
    start: int,
    device: torch.device,
) -> Tensor:
    """Mean loss, float64 `[len(moved)]`, of batches that enter block `start`, once they have been
    taken through the blocks from there on.
    """
    for index in range(start, len(skeleton.blocks)):
        block = skeleton.load_block(index, device)
        advance(moved, capture.through(block, states.arguments[index]))
        skeleton.free_block(index)
    losses = []
    with head(skeleton, states, device) as logits:
        for moved_batch in moved:
            number = moved_batch.number
            ids = states.ids[number]
            losses.append(
                next_token_loss(logits(number, moved_batch.hidden), ids).double()
                / ids[:, 1:].numel()
            )
    return torch.stack(losses) if losses else torch.zeros(0, dtype=torch.float64)


def _steadiness(halves: dict[str, tuple[float, float]], evaluations: int) -> dict[str, Any]:
    """Rank correlation of the scores of two halves of the evaluations, and a warning where it is
    low.
    """
    if evaluations < 2:
        return {
            "warning": (
                "one evaluation cannot show how noisy zeroth-order scores are: give "
                "ratios.evaluations=2 or more"
            )
        }
    first, second = (
        torch.tensor([both[half] for both in halves.values()]).argsort().argsort().double()
        for half in (0, 1)
    )
    agreement = torch.corrcoef(torch.stack([first, second]))[0, 1].item() if len(first) > 1 else 1.0
    found: dict[str, Any] = {"rank_correlation": agreement}
    if agreement < _STEADY:
        found["warning"] = (
            f"zeroth-order scores are mostly noise: two halves of the evaluations agree in rank by "
            f"{agreement:.2f} only; "
            "raise ratios.evaluations, or use ratios.score=first"
        )
    return found
