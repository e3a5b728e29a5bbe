"""That block by block computes what the model itself does, seen on its first blocks.

The recorder refuses what it knows it cannot follow. What it does not see would be wrong in silence:
a decoder that changes what one block hands to another, a block that writes into what it is given.
So the model's own forward runs once more, with its first blocks in place, one loaded at a time, and
what leaves each is held against what leaves it in a run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from compressor.calibration.arguments import Arguments, leaves, tree_of
from compressor.calibration.capture import States, forwards
from compressor.calibration.hidden_states import Batch
from compressor.errors import CheckpointError
from compressor.model.kinds import first_of_each_kind
from compressor.model.skeleton import Skeleton

_BATCHES = 2  # what depends on the tokens shows in the second
_LEAST, _MOST = 2, 8  # blocks
_NEAR = {torch.float32: 1e-4, torch.float64: 1e-4}  # of the largest number
_NEAR_16 = 1e-2  # the same computation twice: only sums in another order may differ


@torch.no_grad()
def check_agreement(skeleton: Skeleton, states: States, device: torch.device) -> None:
    """Compare the first two batches, in as many blocks as hold one of each kind (8 at most), with
    the model's own forward. In memory are the embeddings and one block; `states` stay as they are.

    Raises:
        CheckpointError: they differ.
    """
    decoder, depth = skeleton.load_embeddings(device), _depth(skeleton, states.arguments)
    for number, ids in enumerate(states.ids[:_BATCHES]):
        both = _Both(skeleton, states, device, states.hidden[number], depth)
        with forwards(skeleton, both.forward):
            decoder(input_ids=ids, use_cache=False)
    skeleton.free_embeddings()


class _Both:
    """Stands in for the blocks while the model's own forward runs on one batch: computes the first
    ones with what the model gives them, and beside that with what was recorded.
    """

    def __init__(
        self, skeleton: Skeleton, states: States, device: torch.device, batch: Batch, depth: int
    ) -> None:
        self._skeleton, self._states, self._device = skeleton, states, device
        self._batch = Batch(batch.number, batch.hidden.clone())
        self._depth = depth

    def forward(self, index: int) -> Callable[..., Any]:
        """What block `index` is replaced by."""

        def forward(*positional: Any, **keywords: Any) -> Any:
            if index >= self._depth:
                hidden = positional[0] if positional else keywords["hidden_states"]
                assert self._states.returns is not None
                return self._states.returns.passing(hidden)[0]
            block = self._skeleton.load_block(index, self._device)
            compute = partial(type(block).forward, block)
            before = self._batch.hidden.clone()
            leaving = self._states.arguments[index].call(compute, self._batch)
            if not _alike(self._batch.hidden, before):
                raise self._refusal(f"block {index} changes the hidden states that it is given")
            answer = compute(*positional, **keywords)
            own = answer[0] if isinstance(answer, tuple | list) else answer
            if not _alike(leaving.hidden, own):
                raise self._refusal(
                    f"what leaves block {index} in batch {self._batch.number} is not what the "
                    f"model itself computes"
                )
            self._batch = leaving
            self._skeleton.free_block(index)
            return answer

        return forward

    def _refusal(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"a {self._skeleton.config.model_type} model computes otherwise block by block than "
            f"whole ({what}); it cannot be compressed block by block"
        )


def _depth(skeleton: Skeleton, arguments: list[Arguments]) -> int:
    """How many blocks there are up to the first of the last kind."""
    given = [
        tuple(map(_described, leaves(tree_of(own.positional, own.keywords)))) for own in arguments
    ]
    first = first_of_each_kind(skeleton.blocks, skeleton.config, given)
    most = min(_MOST, len(skeleton.blocks))
    return min(most, max(_LEAST, 1 + max(index for index in first if index < most)))


def _described(leaf: Any) -> Any:
    """What arguments of blocks of one kind have in common."""
    return leaf if isinstance(leaf, str) else type(leaf)


def _alike(one: Tensor, other: Tensor) -> bool:
    """Whether they are the same but for rounding. Numbers that are not finite are alike: a run says
    by itself where it meets them.
    """
    if one.shape != other.shape:
        return False
    if torch.equal(one, other) or not torch.isfinite(other).all():
        return True
    near = _NEAR.get(other.dtype, _NEAR_16)
    return bool((one.double() - other.double()).abs().max() <= near * other.abs().max().double())
