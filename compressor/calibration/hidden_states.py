"""Hidden states on their way through the blocks, batch by batch, with what blocks hand on beside
them.

A block may give later blocks more than its hidden states: indices of an indexer, states of a
router, shared keys and values. These are pieces of a batch too: they rest, travel and are saved
with it.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compressor.calibration.tensor_store import TensorStore
from compressor.checkpoint.work_state import SCRATCH

Key = tuple[str | int, ...]
"""Which block handed a piece on, and which piece: see compressor/calibration/arguments.py."""


@dataclass(frozen=True)
class Batch:
    """One batch of the calibration as it enters or leaves a block.

    Attributes:
        number: of the batch, from 0.
        hidden: hidden states, `[batch, seq, dim]` (some families have a dimension more).
        handed: what blocks before handed on for later ones to read.
    """

    number: int
    hidden: Tensor
    handed: Mapping[Key, Tensor] = field(default_factory=dict)


Step = Callable[[Batch], Batch]


class Batches(Sequence[Batch]):
    """Batches of one shape and dtype, given out on `device`, numbered from 0.

    Args:
        device: where they are used.
        home: where they rest: a device, or a folder.
        name: of their files in the folder.
    """

    def __init__(
        self, device: torch.device, home: torch.device | Path, name: str = "hidden"
    ) -> None:
        self.device, self.home, self.name = device, home, name
        self._hidden = TensorStore(device, home, name)
        self._handed: dict[Key, TensorStore] = {}
        self._numbers: list[int] = []
        self._temporary = False
        self._origin: Batches | None = None  # whose files a view reads

    @classmethod
    def temporary(cls, device: torch.device, home: torch.device | Path) -> Batches:
        """None yet, for batches of any number; on disk in a folder of their own inside `home`,
        which goes when they do.
        """
        if not isinstance(home, Path):
            batches = Batches(device, home)
        else:
            folder = Path(tempfile.mkdtemp(prefix=SCRATCH, dir=home))
            batches = Batches(device, folder)
            weakref.finalize(batches, shutil.rmtree, folder, ignore_errors=True)
        batches._temporary = True
        return batches

    def view(self, count: int) -> Batches:
        """The first `count`, without a copy: taking them through blocks leaves these as they
        are.
        """
        twin = Batches.temporary(self.device, self.home)
        twin._origin, twin._numbers = self, self._numbers[:count]
        twin._hidden = self._hidden.view(count, twin.home)
        twin._handed = {key: store.view(count, twin.home) for key, store in self._handed.items()}
        return twin

    @property
    def hands_on(self) -> bool:
        """Whether they have more than hidden states."""
        return bool(self._handed)

    def __len__(self) -> int:
        return len(self._hidden)

    def __getitem__(self, index: Any) -> Any:
        """A batch on the device, or a list of batches for a slice."""
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(len(self)))]
        hidden = self._hidden[index]
        place = index % len(self)
        handed = {key: store[place] for key, store in self._handed.items()}
        return Batch(self._numbers[place], hidden, handed)

    def append(self, batch: Batch) -> None:
        """Add a batch after the last."""
        assert self._temporary or batch.number == len(self)
        assert not self._origin, "a view's files are those of others"
        if not self._numbers:
            self._handed = {key: self._store(place) for place, key in enumerate(batch.handed)}
        assert self._handed.keys() == batch.handed.keys()
        self._numbers.append(batch.number)
        self._hidden.append(batch.hidden)
        for key, tensor in batch.handed.items():
            self._handed[key].append(tensor)

    def advance(self, step: Step) -> None:
        """Put `step(batch)` in the place of every batch. On disk the old ones stay until
        `forget`, unless these are temporary.
        """
        handed: dict[Key, TensorStore] = {}
        with self._hidden.rewriting() as put:
            for number in range(len(self)):
                batch = step(self[number])
                put(number, batch.hidden)
                if number == 0:
                    handed = {key: self._store(place) for place, key in enumerate(batch.handed)}
                assert handed.keys() == batch.handed.keys()
                for key, tensor in batch.handed.items():
                    handed[key].append(tensor)
        self._handed = handed
        if self._temporary and isinstance(self.home, Path):
            self.forget(self.home)

    def save(self, folder: Path) -> dict[str, Any]:
        """Force them to disk, in `folder`; returns what `load` needs to find and check them there,
        as JSON values.
        """
        saved = self._hidden.save(folder)
        handed = [{"key": list(key), **store.save(folder)} for key, store in self._handed.items()]
        return {**saved, "handed": handed} if handed else saved

    def load(self, folder: Path, saved: dict[str, Any]) -> None:
        """Become what `save` wrote, of these or others. Raises OutputError where a file is not
        that.
        """
        self._hidden.load(folder, saved)
        self._numbers, self._handed = list(range(len(self._hidden))), {}
        for piece in saved.get("handed", []):
            store = TensorStore(self.device, self.home, piece["name"])
            store.load(folder, piece)
            self._handed[tuple(piece["key"])] = store

    def forget(self, folder: Path) -> None:
        """Remove the files of earlier blocks."""
        self._hidden.forget(folder)
        files = {store.path for store in self._handed.values()}
        for path in folder.glob(f"{self.name}.handed.*"):
            if path not in files:
                path.unlink()

    def _store(self, place: int) -> TensorStore:
        name = f"{self.name}.handed.{place}"
        return TensorStore(self.device, self.home, name, self._hidden.generation)


def advance(batches: Batches | list[Batch], step: Step) -> None:
    """Put `step(batch)` in the place of every batch."""
    if isinstance(batches, Batches):
        batches.advance(step)
    else:
        for number, batch in enumerate(batches):
            batches[number] = step(batch)
