"""What calibration runs on: token samples, and the hidden states they are on entering the first block.

The keyword arguments each block is called with (masks, position embeddings) are captured per block: blocks of one model
differ in them (sliding windows, local and global rotary tables), and those of block 0 are wrong for the others.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from compressor.errors import CheckpointError
from compressor.model import Skeleton

_BATCH_TOKENS = 2048  # tokens in one forward pass of a block: bounds activations, whatever the number of samples


@dataclass
class States:
    """Calibration on its way through the model.

    Attributes:
        hidden: hidden states entering the next block, batches of `[batch, seq, dim]`.
        dense: the same in the dense model; empty unless blocks are tuned towards it.
        arguments: per block, the further positional arguments and the keyword arguments it is called with.
    """

    hidden: list[Tensor]
    arguments: list[tuple[tuple[Any, ...], dict[str, Any]]]
    dense: list[Tensor] = field(default_factory=list)


def run(block: nn.Module, hidden: Tensor, arguments: tuple[tuple[Any, ...], dict[str, Any]]) -> Tensor:
    """One block applied to hidden states `[batch, seq, dim]`; what it returns beside them is dropped."""
    positional, keywords = arguments
    with torch.no_grad():
        output = block(hidden, *positional, **keywords)
    return output[0] if isinstance(output, tuple) else output


def batch_size(samples: int, seq_len: int) -> int:
    """The largest divisor of `samples` that keeps a batch within 2048 tokens: all batches then share their masks."""
    return max(size for size in range(1, samples + 1) if samples % size == 0 and (size == 1 or size * seq_len <= _BATCH_TOKENS))


def capture(skeleton: Skeleton, ids: Tensor, device: torch.device) -> States:
    """Run the embeddings on `ids` `[samples, seq]` and record what reaches the blocks.

    The model's own forward runs with recorders in place of the blocks' forwards, so that whatever a family does before
    its blocks is done. Block 0 runs for real once: it shows whether blocks return a tensor or a tuple.
    """
    decoder = skeleton.load_embeddings(device)
    batches = ids.to(device).split(batch_size(*ids.shape))
    first = skeleton.load_block(0, device)
    states = States([], [((), {}) for _ in skeleton.blocks])
    returns_tuple = isinstance(_record(skeleton, decoder, batches[0], states, first.forward), tuple)
    skeleton.free_block(0)
    states.hidden.clear()
    for batch in batches:
        _record(
            skeleton,
            decoder,
            batch,
            states,
            (lambda hidden, *_, **__: (hidden,)) if returns_tuple else (lambda hidden, *_, **__: hidden),
        )
    skeleton.free_embeddings()
    return states


def _record(skeleton: Skeleton, decoder: nn.Module, ids: Tensor, states: States, first: Any) -> Any:
    """One forward pass of the decoder with recorders for blocks; block 0 answers with `first(hidden, …)`, which is returned."""
    answer: list[Any] = []

    def recorder(index: int) -> Any:
        def forward(hidden: Tensor, *positional: Any, **keywords: Any) -> Any:
            states.arguments[index] = (positional, keywords)
            if index == 0:
                states.hidden.append(hidden)
                answer.append(first(hidden, *positional, **keywords))
            return (hidden, *answer[0][1:]) if isinstance(answer[0], tuple) else hidden

        return forward

    for index, block in enumerate(skeleton.blocks):
        block.forward = recorder(index)
    try:
        with torch.no_grad():
            decoder(input_ids=ids, use_cache=False)
    finally:
        for block in skeleton.blocks:
            block.__dict__.pop("forward", None)
    if not answer:
        raise CheckpointError(
            f"the decoder of {skeleton.config.model_type!r} does not call the blocks {skeleton.path} that were found"
        )
    return answer[0]
