"""How much the loss would rise if one linear were compressed: a Fisher-weighted output error.

To second order, changing one weight W to W + ΔW moves the model's predictions by

    KL ≈ ½ E Σ_t (g_t · ΔW x_t)²                      x_t the input, g_t = ∂loss/∂y_t, at token t

which is the Fisher information in the direction ΔW (Kunstner et al. 2019,
https://arxiv.org/abs/1905.12558) without its correlations between tokens: keeping them, by summing
inside a sequence before squaring, would leave one number a sequence to average over instead of one
a token. The expectation is over labels drawn from the model's own predictions; the labels of the
text serve as well, the empirical Fisher information. ΔW is what the run's own method makes of W, so
mask and update are those that will be applied. One streamed forward and backward pass serves all
linears and all levels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from compressor.calibration.capture import States
from compressor.calibration.float32 import check_seen, in_float32
from compressor.calibration.gradients import Loss, Taps, backward_blocks, next_token_loss
from compressor.engine.plan import Plan
from compressor.engine.task import Target, Task
from compressor.progress import Progress
from compressor.stats import InputStats

Levels = Callable[[Task], Sequence[Target]]
"""The targets to try for a linear."""


def error_curves(
    plan: Plan,
    levels: Levels,
    states: States,
    device: torch.device,
    progress: Progress,
    *,
    tokens: int,
    sampled: bool,
) -> dict[str, list[float]]:
    """Estimated rise of the loss, nats a token, for every linear and each of its levels.

    Args:
        plan: the method and its options; a refinement is left out, it changes the order of the
            linears little.
        levels: what to try.
        states: calibration on entering block 0, left as it is.
        device: where blocks are computed.
        progress: told of every block.
        tokens: calibration tokens to use at least, if there are so many.
        sampled: draw the labels from the model, else take the tokens that follow in the text.
    """
    skeleton, part = in_float32(plan.skeleton, states, tokens, device)
    curves: dict[str, list[float]] = {}
    loss = sampled_label_loss(plan.seed) if sampled else next_token_loss
    for done, (index, taps) in enumerate(backward_blocks(skeleton, part, device, loss=loss)):
        statistics: dict[int, InputStats] = {}
        for task in plan.tasks[index]:
            tap = taps[task.linear.name]
            check_seen(task.linear.name, tap)
            stats = _shared_statistics(statistics, tap, gram=task.method.NEEDS_GRAM)
            weight = task.linear.read(plan.reader).to(device)
            curves[task.linear.name] = [
                _rise(
                    task.method.compress(weight, stats, target, **task.options).dense().float()
                    - weight.float(),
                    tap,
                )
                for target in levels(task)
            ]
        progress("error curves", done + 1, len(plan.tasks))
    return curves


def sampled_label_loss(seed: int) -> Loss:
    """Cross-entropy with labels drawn from the model's own predictions, Σ over tokens; the draw is
    the same on every device.
    """
    generator = torch.Generator().manual_seed(seed)

    def loss(logits: Tensor, ids: Tensor) -> Tensor:
        flat = logits.flatten(0, 1).float()
        levels = torch.rand(len(flat), 1, generator=generator).to(flat.device)
        labels = torch.searchsorted(flat.detach().softmax(-1).cumsum(-1), levels).clamp_max(
            flat.shape[1] - 1
        )
        return cross_entropy(flat, labels.squeeze(1), reduction="sum")

    return loss


def _shared_statistics(known: dict[int, InputStats], tap: Taps, *, gram: bool) -> InputStats:
    """Statistics of the inputs of a linear, made once for those that read the same tensor."""
    stats = known.get(id(tap.inputs[0]))
    if stats is None or (gram and stats.gram is None):
        first = tap.inputs[0]
        stats = known[id(first)] = InputStats(first.shape[-1], gram=gram, device=first.device)
        for rows in tap.inputs:
            stats.update(rows)
    return stats


def _rise(change: Tensor, tap: Taps) -> float:
    """½ Σ (g_t · ΔW x_t)² / tokens, for ΔW `[out, in]`."""
    total, tokens = 0.0, 0
    for x, g in zip(tap.inputs, tap.gradients, strict=True):
        total += torch.linalg.vecdot(x @ change.T, g).double().square().sum().item()
        tokens += len(x)
    return total / (2 * max(tokens, 1))
