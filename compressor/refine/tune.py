"""Block tuning: the kept weights of all linears of a block are trained together until its output is that of the dense model.

Guo et al., EBFT, https://arxiv.org/abs/2402.12419: with the masks fixed, minimise over the kept weights of one block f

    Σ over calibration tokens of ‖f(h) - t‖²

by Adam on the block's own gradients, h the hidden states that enter it in the compressed model. The target t is the output
of the dense block *on the hidden states of the dense model* (EBFT: of the dense block on h), so that a block also
corrects what the blocks before it got wrong. It comes after the linears were pruned and refined one by one, sees what
these cannot (attention, the gate, the residual), costs backward passes through one block at a time, and adds no bytes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Arguments = tuple[tuple[Any, ...], dict[str, Any]]  # positional and keyword

_BETAS = (0.9, 0.95)


def tune(
    block: nn.Module,
    weights: Mapping[str, nn.Parameter],
    hidden: Sequence[Tensor],
    targets: Sequence[Tensor],
    arguments: Arguments = ((), {}),
    *,
    epochs: int = 4,
    rate: float = 0.05,
    seed: int = 0,
) -> tuple[float, float]:
    """Train the non-zeros of `weights` in place; zeros stay zero, everything else in the block stays as it is.

    Args:
        block: decoder block, called as `block(hidden, *positional, **keywords)`; returns a tensor, or a tuple that begins with it.
        weights: those of its parameters to train, by any name; their non-zeros are the masks.
        hidden: batches `[batch, seq, dim]` entering the block.
        targets: what should leave it, same shapes.
        arguments: positional and keyword arguments of every call.
        epochs: passes over the batches; 0 changes nothing.
        rate: Adam's first step size in units of each weight's root mean square over its non-zeros; falls to 0 along a cosine.
        seed: of the order of the batches.

    Returns:
        Relative squared error of the block's output before and after, both in the storage dtype. Where the
        training did not lower it the weights are left as they were.
    """
    before = _error(block, hidden, targets, arguments)
    if not epochs:
        return before, before
    stored = {name: weight.detach().clone() for name, weight in weights.items()}
    kinds = {name: parameter.dtype for name, parameter in block.named_parameters()}
    flags = {name: parameter.requires_grad for name, parameter in block.named_parameters()}
    block.float()
    block.requires_grad_(False)
    try:
        _train(block, weights, hidden, targets, _in_float(arguments), epochs, rate, seed)
    finally:
        for name, parameter in block.named_parameters():
            parameter.data = parameter.data.to(kinds[name])
            parameter.grad = None
            parameter.requires_grad_(flags[name])
    after = _error(block, hidden, targets, arguments)
    if after < before:
        return before, after
    for name, weight in weights.items():
        weight.data = stored[name]
    return before, before


def _train(
    block: nn.Module,
    weights: Mapping[str, nn.Parameter],
    hidden: Sequence[Tensor],
    targets: Sequence[Tensor],
    arguments: Arguments,
    epochs: int,
    rate: float,
    seed: int,
) -> None:
    masks = {name: weight != 0 for name, weight in weights.items()}
    groups = []
    for name, weight in weights.items():
        weight.requires_grad_(True)
        size = weight.detach().square().sum() / masks[name].sum().clamp_min(1)
        groups.append({"params": [weight], "lr": rate * size.sqrt().item()})
    optimizer = torch.optim.Adam(groups, betas=_BETAS)
    total = epochs * len(hidden)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / total)))
    scale = _scale(hidden, targets)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for index in torch.randperm(len(hidden), generator=generator).tolist():
            with torch.enable_grad():
                output = _call(block, hidden[index].float(), arguments)
                loss = (output - targets[index].float()).square().mean() / scale
                loss.backward()
            for name, weight in weights.items():
                assert weight.grad is not None, name
                weight.grad.mul_(masks[name])  # a gradient of zero moves nothing in Adam: pruned weights stay zero
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()


def _scale(hidden: Sequence[Tensor], targets: Sequence[Tensor]) -> Tensor:
    """What the block adds to the residual stream, mean square: the loss is relative to it."""
    changes = [(target.float() - batch.float()).square().mean() for batch, target in zip(hidden, targets, strict=True)]
    return torch.stack(changes).mean().clamp_min(1e-30)


@torch.no_grad()
def _error(block: nn.Module, hidden: Sequence[Tensor], targets: Sequence[Tensor], arguments: Arguments) -> float:
    """‖f(h) - t‖² / ‖t - h‖² over all batches."""
    pairs = zip(hidden, targets, strict=True)
    missed = [(_call(block, batch, arguments).float() - target.float()).square().mean() for batch, target in pairs]
    return (torch.stack(missed).mean() / _scale(hidden, targets)).item()


def _call(block: nn.Module, hidden: Tensor, arguments: Arguments) -> Tensor:
    positional, keywords = arguments
    output = block(hidden, *positional, **keywords)
    return output[0] if isinstance(output, tuple) else output


def _in_float(value: Any) -> Any:
    """Floating tensors inside tuples, lists and dictionaries, masks and position embeddings among them, in float32."""
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(_in_float(item) for item in value)
    return {key: _in_float(item) for key, item in value.items()} if isinstance(value, dict) else value
