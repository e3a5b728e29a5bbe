"""Block tuning: what is left of all linears of a block is trained together until its output is that
of the dense model.

Guo et al., EBFT, https://arxiv.org/abs/2402.12419: with the masks fixed, minimise over the kept
weights of one block f

    Σ over calibration tokens of ‖f(h) - t‖²

by Adam on the block's own gradients, h the hidden states that enter it in the compressed model. The
target t is the output of the dense block *on the hidden states of the dense model* (EBFT: of the
dense block on h), so that a block also corrects what the blocks before it got wrong. It comes after
the linears were compressed one by one, sees what these cannot (attention, the gate, the residual),
costs backward passes through one block at a time, and adds no bytes. A weight that is stored as a
product is trained in its factors.
"""

from __future__ import annotations

import math
from collections import UserDict
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.func import functional_call

from compressor.calibration.arguments import Arguments
from compressor.calibration.hidden_states import Batch
from compressor.formats import Form, notes

Factors = dict[str, dict[str, Tensor]]
Place = Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]]
Call = Callable[[Mapping[str, Tensor], Batch], Tensor]

_BETAS = (0.9, 0.95)
_PRODUCT = (
    0.2  # of the step size, for the factors of a product: all of them move at once (docs/armor.md)
)


def tune(
    block: nn.Module,
    forms: Mapping[str, Form],
    hidden: Sequence[Batch],
    targets: Sequence[Batch],
    arguments: Arguments | None = None,
    *,
    place: Place = dict,
    epochs: int = 4,
    rate: float = 0.05,
    seed: int = 0,
) -> tuple[dict[str, Form], float, float]:
    """Train the non-zeros of the factors of `forms`; zeros stay zero, everything else in the block
    stays as it is.

    Args:
        block: decoder block, called as `block(hidden, *positional, **keywords)`; returns a tensor,
            or a tuple that begins with it. It is left as it was.
        forms: what to train, by a name of each.
        hidden: batches entering the block.
        targets: what should leave it.
        arguments: what the block is called with beside the hidden states; by default nothing.
        place: turns weights `[out, in]`, by the names of their forms, into parameters of the block,
            by theirs, such as
            `mlp.up_proj.weight`; differentiable. Without it the names are those of parameters.
        epochs: passes over the batches; 0 changes nothing.
        rate: Adam's first step size in units of each factor's root mean square over its non-zeros;
            falls to 0 along a cosine.
        seed: of the order of the batches.

    Returns:
        The trained forms, and the relative squared error of the block's output before and after,
        both in the storage dtype. Where the training did not lower it these are the forms that were
        given.
    """
    given, arguments = dict(forms), arguments or Arguments()
    call = _caller(block, arguments, place)
    before = _error(call, given, hidden, targets)
    if not epochs:
        return given, before, before
    kinds = {name: parameter.dtype for name, parameter in block.named_parameters()}
    flags = {name: parameter.requires_grad for name, parameter in block.named_parameters()}
    block.float().requires_grad_(False)
    try:
        wide = _caller(block, arguments, place, wide=True)
        factors = _train(wide, given, hidden, targets, epochs, rate, seed)
    finally:
        for name, parameter in block.named_parameters():
            parameter.data = parameter.data.to(kinds[name])
            parameter.requires_grad_(flags[name])
    trained = {name: _rebuilt(form, factors[name]) for name, form in given.items()}
    after = _error(call, trained, hidden, targets)
    return (trained, before, after) if after < before else (given, before, before)


def _caller(block: nn.Module, arguments: Arguments, place: Place, *, wide: bool = False) -> Call:
    """`call(weights, batch)`: what leaves the block with `weights` `[out, in]` in place of its own.

    With `wide` everything it is called with is in float32.
    """

    def call(weights: Mapping[str, Tensor], batch: Batch) -> Tensor:
        placed = {
            name: weight.to(block.get_parameter(name).dtype)
            for name, weight in place(weights).items()
        }

        def placed_block(*positional: Any, **keywords: Any) -> Any:
            if wide:
                positional, keywords = _in_float(positional), _in_float(keywords)
            return functional_call(block, placed, positional, keywords)

        return arguments.call(placed_block, batch).hidden

    return call


def _rebuilt(form: Form, factors: Mapping[str, Tensor]) -> Form:
    """A form like `form`, of `factors` rounded to its dtype."""
    kinds = {part: tensor.dtype for part, tensor in form.factors().items()}
    rounded = {part: factor.detach().to(kinds[part]) for part, factor in factors.items()}
    note = {"note": said} if (said := notes(form).get("note")) else {}
    return replace(cast(Any, type(form).from_factors(**rounded)), **note)


def _train(
    call: Call,
    forms: Mapping[str, Form],
    hidden: Sequence[Batch],
    targets: Sequence[Batch],
    epochs: int,
    rate: float,
    seed: int,
) -> Factors:
    """The factors of `forms` after Adam on `call`, float32."""
    factors: Factors = {
        name: {
            part: nn.Parameter(factor.detach().float().clone())
            if factor.is_floating_point()
            else factor  # indices: they are given
            for part, factor in form.factors().items()
        }
        for name, form in forms.items()
    }
    every = [
        factor for parts in factors.values() for factor in parts.values() if factor.requires_grad
    ]
    masks = [factor.detach() != 0 for factor in every]
    groups = [
        {"params": [factor], "lr": rate * _size(factor) * (_PRODUCT if len(parts) > 1 else 1)}
        for parts in factors.values()
        for factor in parts.values()
        if factor.requires_grad
    ]
    optimizer = torch.optim.Adam(groups, betas=_BETAS)
    total = epochs * len(hidden)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / total))
    )
    scale = _scale(hidden, targets)
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for index in torch.randperm(len(hidden), generator=generator).tolist():
            with torch.enable_grad():
                output = call(
                    {name: forms[name].product(**parts) for name, parts in factors.items()},
                    hidden[index],
                )
                loss = (output - targets[index].hidden.float()).square().mean() / scale
                loss.backward()
            for factor, mask in zip(every, masks, strict=True):
                assert factor.grad is not None
                factor.grad.mul_(
                    mask
                )  # a gradient of zero moves nothing in Adam: pruned weights stay zero
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return factors


def _size(factor: Tensor) -> float:
    """Root mean square over the non-zeros."""
    factor = factor.detach()
    return (factor.square().sum() / factor.count_nonzero().clamp_min(1)).sqrt().item()


def _scale(hidden: Sequence[Batch], targets: Sequence[Batch]) -> Tensor:
    """What the block adds to the residual stream, mean square: the loss is relative to it."""
    changes = [
        (target.hidden.float() - batch.hidden.float()).square().mean()
        for batch, target in zip(hidden, targets, strict=True)
    ]
    return torch.stack(changes).mean().clamp_min(1e-30)


@torch.no_grad()
def _error(
    call: Call, forms: Mapping[str, Form], hidden: Sequence[Batch], targets: Sequence[Batch]
) -> float:
    """‖f(h) - t‖² / ‖t - h‖² over all batches."""
    weights = {name: form.dense() for name, form in forms.items()}
    pairs = zip(hidden, targets, strict=True)
    missed = [
        (call(weights, batch).float() - target.hidden.float()).square().mean()
        for batch, target in pairs
    ]
    return (torch.stack(missed).mean() / _scale(hidden, targets)).item()


def _in_float(value: Any) -> Any:
    """Floating tensors inside tuples, lists and dictionaries, masks and position embeddings among
    them, in float32.
    """
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, tuple | list):
        return type(value)(_in_float(item) for item in value)
    if isinstance(value, dict | UserDict):
        wide = copy(value)
        wide.update({key: _in_float(item) for key, item in value.items()})
        return wide
    return value
