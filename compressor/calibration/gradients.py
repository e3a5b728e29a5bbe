"""Gradients of the loss with one block in memory: the chain rule over blocks, each loaded twice.

Forward, the hidden states entering every block are put on disk. Backward, block after block from
the last: load it, run it again with gradients, pull the gradient of its output back to its input.
The result is that of automatic differentiation of the whole model (rounding apart); memory is one
block, its activations for one batch, the gradients under way, and what is asked for of the block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from compressor.calibration import capture
from compressor.calibration.arguments import Arguments
from compressor.calibration.capture import States
from compressor.calibration.head import head
from compressor.calibration.hidden_states import Batch, Batches, advance
from compressor.errors import CheckpointError
from compressor.model.linear import Linear
from compressor.model.skeleton import Skeleton

Loss = Callable[[Tensor, Tensor], Tensor]
"""`[batch, seq, vocab]` logits and `[batch, seq]` tokens -> a scalar, summed over tokens."""


@dataclass
class Taps:
    """What went through one linear, batch by batch.

    Attributes:
        inputs: rows x, `[tokens, in]`; the linears that read one tensor hold the same object.
        gradients: rows of ∂loss/∂y, `[tokens, out]`; zeros where the loss does not depend on y.
    """

    inputs: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor] = field(default_factory=list)


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Σ over tokens of the cross-entropy of the next one, in nats."""
    return cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="sum"
    )


def backward_blocks(
    skeleton: Skeleton, states: States, device: torch.device, *, loss: Loss = next_token_loss
) -> Iterator[tuple[int, dict[str, Taps]]]:
    """Yields each block's index, last block first, and the Taps of its linears by name; the block
    is loaded meanwhile.

    Args:
        skeleton: the model; its dtype is that of the arithmetic: bfloat16 gradients are mostly
            rounding.
        states: calibration on entering block 0; left as it is.
        device: where the blocks are computed.
        loss: of the logits of a batch.

    Raises:
        CheckpointError: blocks hand more than hidden states to later ones; the gradient along that
            way would be missing.
    """
    inputs: list[list[Batch] | Batches] = [states.hidden]
    for index in range(len(skeleton.blocks)):
        block = skeleton.load_block(index, device)
        leaving = states.room_on_disk(device)
        for batch in inputs[-1]:
            leaving.append(capture.run(block, batch, states.arguments[index]))
        skeleton.free_block(index)
        if leaving.hands_on:
            raise CheckpointError(
                f"blocks of a {skeleton.config.model_type} model hand more than hidden states to "
                f"later ones: gradients cannot be taken block by block; choose what needs none"
            )
        inputs.append(leaving)
    gradients = states.room()
    with head(skeleton, states, device) as logits:
        for batch in inputs.pop():
            leaf = batch.hidden.detach().requires_grad_()
            with torch.enable_grad():
                value = loss(logits(batch.number, leaf), states.ids[batch.number])
            gradients.append(replace(batch, hidden=torch.autograd.grad(value, leaf)[0]))
    for index in reversed(range(len(skeleton.blocks))):
        block, entering = skeleton.load_block(index, device), inputs.pop()
        with tapping(skeleton.linears(index)) as taps:
            advance(gradients, partial(_pulled_back, block, states.arguments[index], entering))
        del entering  # and their file
        yield index, taps
        skeleton.free_block(index)


def _pulled_back(
    block: nn.Module, arguments: Arguments, entering: list[Batch] | Batches, gradient: Batch
) -> Batch:
    """The gradient of what entered a block, from that of what left it."""
    batch = entering[gradient.number]
    leaf = replace(batch, hidden=batch.hidden.detach().requires_grad_())
    with torch.enable_grad():
        output = arguments.call(block, leaf).hidden
    return replace(gradient, hidden=torch.autograd.grad(output, leaf.hidden, gradient.hidden)[0])


@contextmanager
def tapping(linears: list[Linear]) -> Iterator[dict[str, Taps]]:
    """Hook `linears` and yield their Taps, filled by every differentiable forward pass run inside
    the `with`.
    """
    taps = {linear.name: Taps() for linear in linears}
    seen: list[tuple[Tensor, Tensor]] = []  # the tensor a linear was given last, and its rows

    def before(name: str) -> Callable[..., None]:
        def keep(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0]
            rows = next((rows for tensor, rows in seen if tensor is x), None)
            if rows is None:
                rows = x.detach().reshape(-1, x.shape[-1])
                seen[:] = [*seen[-8:], (x, rows)]
            taps[name].inputs.append(rows)

        return keep

    def after(name: str) -> Callable[..., None]:
        def keep(_module: nn.Module, _args: tuple[Tensor, ...], output: Tensor) -> None:
            gradients, width = taps[name].gradients, output.shape[-1]
            number = len(gradients)  # zeros that take no memory, until a gradient arrives
            gradients.append(output.new_zeros(()).expand(output.numel() // width, width))

            def arrived(gradient: Tensor) -> None:
                gradients[number] = gradient.reshape(-1, width)

            if output.requires_grad:
                output.register_hook(arrived)

        return keep

    handles = [linear.module.register_forward_pre_hook(before(linear.name)) for linear in linears]
    handles += [linear.module.register_forward_hook(after(linear.name)) for linear in linears]
    try:
        yield taps
    finally:
        for handle in handles:
            handle.remove()
