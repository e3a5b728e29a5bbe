"""What calibration runs on: token samples, and the hidden states they are on entering the first
block.

The arguments each block is called with (masks, position embeddings) are captured per block: blocks
of one model differ in them (sliding windows, local and global rotary tables), and those of block 0
are wrong for the others. Those that depend on the tokens are captured per batch.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compressor.calibration.arguments import Arguments
from compressor.calibration.hidden_states import Batch, Batches, Step
from compressor.calibration.recorder import Nothing, Recorder, Returns
from compressor.calibration.tensor_store import TensorStore
from compressor.errors import CheckpointError
from compressor.model.skeleton import Skeleton

# tokens in one forward pass of a block: bounds activations, whatever the number of samples
_BATCH_TOKENS = 2048


Forward = Callable[..., Any]


@dataclass
class States:
    """Calibration on its way through the model.

    Attributes:
        hidden: what enters the next block, batch by batch.
        dense: the same in the dense model; empty unless blocks or linears aim at it.
        arguments: per block, what it is called with beside that.
        ids: the tokens themselves, batches of `[batch, seq]`.
        returns: what a block returns.
        offset: batches of other processes that come before these.
        folder: on disk, for what a pass over the blocks keeps of each of them; None for that of
            temporary files.
        held_out: other samples, which nothing is fitted to; None where there are none.
    """

    hidden: list[Batch] | Batches
    arguments: list[Arguments]
    ids: list[Tensor] = field(default_factory=list)
    returns: Returns | None = None
    dense: list[Batch] | Batches = field(default_factory=list)
    offset: int = 0
    folder: Path | None = None
    held_out: States | None = None

    def first(self, batches: int) -> States:
        """The first batches only, of their own: running them on leaves these states as they are,
        and they rest where these do.
        """
        return replace(
            self,
            hidden=_view(self.hidden, batches),
            ids=self.ids[:batches],
            dense=_view(self.dense, batches),
            offset=0,
            held_out=None,
        )

    def entering(self) -> list[Batch] | Batches:
        """The hidden states, of their own: what takes them through blocks leaves these states as
        they are.
        """
        return _view(self.hidden, len(self.hidden))

    def room(self) -> list[Batch] | Batches:
        """For other batches, where the hidden states rest: none yet. They go when it does."""
        if isinstance(self.hidden, Batches):
            return Batches.temporary(self.hidden.device, self.hidden.home)
        return []

    def room_on_disk(self, device: torch.device) -> Batches:
        """As `room`, on disk, wherever the hidden states rest."""
        return Batches.temporary(device, self.folder or Path(tempfile.gettempdir()))

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
        every = {"hidden": self.hidden, "dense": self.dense}
        if self.held_out:
            every |= {"held_out": self.held_out.hidden, "held_out_dense": self.held_out.dense}
        return [(name, each) for name, each in every.items() if isinstance(each, Batches)]


def _view(batches: list[Batch] | Batches, count: int) -> list[Batch] | Batches:
    return batches.view(count) if isinstance(batches, Batches) else batches[:count]


@torch.no_grad()
def run(block: nn.Module, batch: Batch, arguments: Arguments) -> Batch:
    """What leaves a block that a batch enters."""
    return arguments.call(block, batch)


def through(block: nn.Module, arguments: Arguments) -> Step:
    """`run` with this block: what `advance` takes batches through."""
    return partial(run, block, arguments=arguments)


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
    hidden: list[Batch] | Batches | None = None,
    part: slice = slice(None),
    folder: Path | None = None,
) -> States:
    """Run the embeddings on `ids` `[samples, seq]` and record what reaches the blocks.

    The model's own forward runs with a recorder in place of the blocks, so that whatever a family
    does before its blocks is done. Block 0 runs for real once: it shows what blocks return.

    Args:
        hidden: where the hidden states go, and what differs between batches; on the device, if not
            given.
        part: the batches to run; all, if not given.
        folder: of the states.

    Raises:
        CheckpointError: block by block would not compute what the model does.
    """
    kind = skeleton.config.model_type
    with _nothing_missing(kind):
        decoder = skeleton.load_embeddings(device)
    batches = ids.to(device).split(batch_size(*ids.shape))[part]
    states = States([] if hidden is None else hidden, [], list(batches), folder=folder)
    states.offset = part.start or 0
    first = skeleton.load_block(0, device).forward
    recorder = Recorder(kind, len(skeleton.blocks), first, partial(_store, device, hidden))
    with torch.no_grad(), forwards(skeleton, recorder.forward):
        for number, batch in enumerate(batches):
            recorder.begin()
            with _nothing_missing(kind):
                decoder(input_ids=batch, use_cache=False)
            if recorder.kept is None:
                raise CheckpointError(
                    f"the decoder of {kind!r} does not call the blocks {skeleton.path} that were "
                    f"found"
                )
            recorder.end()
            states.hidden.append(Batch(number, recorder.kept))
            if number == 0:
                skeleton.free_block(0)
    states.arguments, states.returns = recorder.arguments(), recorder.returns
    skeleton.free_embeddings()
    return states


_NEEDED = re.compile(
    r"missing \d+ required positional arguments?: .*|(you (have to|must) specify|exactly 1 of) .*"
    r"|unexpected keyword argument 'input_ids'",  # of several models in one, without a forward
    re.IGNORECASE,
)
"""How a model says that it wants an image or sound beside the tokens."""


@contextmanager
def _nothing_missing(kind: str) -> Iterator[None]:
    """Inside the `with`, a computation is refused that asks for weights that were not loaded, for
    the value of what blocks return beside hidden states, or for more than text.
    """
    try:
        yield
    except (NotImplementedError, RuntimeError, TypeError, ValueError, AttributeError) as error:
        if Nothing.__name__ in str(error):
            raise CheckpointError(
                f"a {kind} model computes, between its blocks, with what they return beside hidden "
                "states; it cannot be compressed block by block"
            ) from None
        if not re.search(r"meta tensor|device meta", str(error)):
            if needed := _NEEDED.search(str(error)):
                raise CheckpointError(
                    f"a {kind} model does not compute on text alone ({needed[0]}); calibration is "
                    "text, so it cannot be compressed"
                ) from None
            raise
        raise CheckpointError(
            f"a {kind} model computes with weights of its blocks, or of parts that text does not "
            "need, outside of its blocks; it cannot be compressed block by block"
        ) from None


def _store(
    device: torch.device, hidden: list[Batch] | Batches | None, number: int
) -> TensorStore | list[Any]:
    """Where an argument that differs between batches rests: where the hidden states do."""
    if not isinstance(hidden, Batches):
        return []
    return TensorStore(device, hidden.home, f"{hidden.name}.argument.{number}")


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
