"""What calibration runs on: token samples, and the hidden states they are on entering the first
block.

The keyword arguments each block is called with (masks, position embeddings) are captured per block:
blocks of one model differ in them (sliding windows, local and global rotary tables), and those of
block 0 are wrong for the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor.calibration.hidden_states import Batches
from compressor.errors import CheckpointError
from compressor.model.skeleton import Skeleton

# tokens in one forward pass of a block: bounds activations, whatever the number of samples
_BATCH_TOKENS = 2048


Arguments = tuple[
    tuple[Any, ...], dict[str, Any]
]  # positional and keyword, beside the hidden states
Forward = Callable[..., Any]


@dataclass
class States:
    """Calibration on its way through the model.

    Attributes:
        hidden: hidden states entering the next block, batches of `[batch, seq, dim]`.
        dense: the same in the dense model; empty unless blocks are tuned towards it.
        arguments: per block, the further positional arguments and the keyword arguments it is
            called with.
        ids: the tokens themselves, batches of `[batch, seq]`.
        tuples: whether the blocks return a tuple.
        offset: batches of other processes that come before these.
    """

    hidden: list[Tensor] | Batches
    arguments: list[Arguments]
    ids: list[Tensor] = field(default_factory=list)
    tuples: bool = False
    dense: list[Tensor] | Batches = field(default_factory=list)
    offset: int = 0

    def first(self, batches: int) -> States:
        """The first batches only, in lists of their own: running them on leaves these states as
        they are.
        """
        return States(
            self.hidden[:batches],
            self.arguments,
            self.ids[:batches],
            self.tuples,
            self.dense[:batches],
        )

    def at_least(self, tokens: int) -> States:
        """As `first`, with as few batches as hold so many tokens; all of them if there are
        fewer.
        """
        batches = -(-tokens // self.ids[0].numel())
        return self.first(max(1, batches))

    def save(self, folder: Path) -> dict[str, Any]:
        """Force the hidden states to disk; returns what `load` needs, as JSON values."""
        return {name: batches.save(folder) for name, batches in self._batches()}

    def load(self, folder: Path, saved: dict[str, Any]) -> None:
        """Have the hidden states that `save` wrote. Raises OutputError where they are not there any
        more.
        """
        for name, batches in self._batches():
            batches.load(folder, saved[name])

    def forget(self, folder: Path) -> None:
        """Remove the files of earlier hidden states."""
        for _, batches in self._batches():
            batches.forget(folder)

    def _batches(self) -> list[tuple[str, Batches]]:
        both = (("hidden", self.hidden), ("dense", self.dense))
        return [(name, batches) for name, batches in both if isinstance(batches, Batches)]


@torch.no_grad()
def run(block: nn.Module, hidden: Tensor, arguments: Arguments) -> Tensor:
    """One block applied to hidden states `[batch, seq, dim]`; what it returns beside them is
    dropped.
    """
    return call(block, hidden, arguments)


def call(block: nn.Module, hidden: Tensor, arguments: Arguments) -> Tensor:
    """As `run`, differentiable."""
    positional, keywords = arguments
    output = block(hidden, *positional, **keywords)
    return output[0] if isinstance(output, tuple) else output


def batch_size(samples: int, seq_len: int) -> int:
    """The largest divisor of `samples` that keeps a batch within 2048 tokens: all batches then
    share their masks.
    """
    return max(
        size
        for size in range(1, samples + 1)
        if samples % size == 0 and (size == 1 or size * seq_len <= _BATCH_TOKENS)
    )


def capture(
    skeleton: Skeleton,
    ids: Tensor,
    device: torch.device,
    hidden: Batches | None = None,
    part: slice = slice(None),
) -> States:
    """Run the embeddings on `ids` `[samples, seq]` and record what reaches the blocks.

    The model's own forward runs with recorders in place of the blocks' forwards, so that whatever a
    family does before its blocks is done. Block 0 runs for real once: it shows whether blocks
    return a tensor or a tuple.

    Args:
        hidden: where the hidden states go; on the device, if not given.
        part: the batches to run; all, if not given.
    """
    decoder = skeleton.load_embeddings(device)
    batches = ids.to(device).split(batch_size(*ids.shape))[part]
    states = States(
        [] if hidden is None else hidden, [((), {}) for _ in skeleton.blocks], list(batches)
    )
    states.offset = part.start or 0
    first = skeleton.load_block(0, device).forward
    answers: list[Any] = []

    def recorder(index: int) -> Forward:
        def forward(hidden: Tensor, *positional: Any, **keywords: Any) -> Any:
            states.arguments[index] = (positional, keywords)
            if index == 0:
                states.hidden.append(hidden)
                if not answers:
                    answers.append(first(hidden, *positional, **keywords))
                    states.tuples = isinstance(answers[0], tuple)
                    skeleton.free_block(0)
                    return answers[0]
            return (hidden, *answers[0][1:]) if states.tuples else hidden

        return forward

    with torch.no_grad(), forwards(skeleton, recorder):
        for batch in batches:
            decoder(input_ids=batch, use_cache=False)
    if not answers:
        raise CheckpointError(
            f"the decoder of {skeleton.config.model_type!r} does not call the blocks "
            f"{skeleton.path} that were found"
        )
    skeleton.free_embeddings()
    return states


@contextmanager
def forwards(skeleton: Skeleton, forward: Callable[[int], Forward]) -> Iterator[None]:
    """Inside the `with`, block `index` is computed by `forward(index)`."""
    for index, block in enumerate(skeleton.blocks):
        block.forward = forward(index)
    try:
        yield
    finally:
        for block in skeleton.blocks:
            block.__dict__.pop("forward", None)
