"""A tensor for every batch of the calibration: on the device, in host memory, or on disk.

Where they rest does not change what is computed from them: a tensor read from disk has the bytes,
the shape and the alignment of one that stayed in memory. Files hold the tensors one after the
other, and are written once per block: they are what a run that was cut off goes on from.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from compressor.checkpoint.atomic import tensor_bytes
from compressor.errors import OutputError

Put = Callable[[int, Tensor], None]
"""Puts a tensor in the place of the one of this number; called with 0, 1, 2, … in order."""


class TensorStore(Sequence[Tensor]):
    """Tensors of one shape and dtype, given out on `device`.

    Args:
        device: where they are used.
        home: where they rest: a device, or a folder.
        name: of their files in the folder.
        generation: how often they were replaced before; part of the files' names.
    """

    def __init__(
        self,
        device: torch.device,
        home: torch.device | Path,
        name: str = "hidden",
        generation: int = 0,
    ) -> None:
        self.device, self.home, self.name = device, home, name
        self._held: list[Tensor] = []
        self._file: Path | None = None
        self._kind: tuple[torch.Size, torch.dtype] | None = None
        self._count, self._generation = 0, generation
        self._digest = hashlib.sha256()

    def __len__(self) -> int:
        return self._count

    @property
    def path(self) -> Path | None:
        """The file they rest in or were saved to."""
        return self._file

    @property
    def generation(self) -> int:
        """How often the tensors were replaced."""
        return self._generation

    def __getitem__(self, index: Any) -> Any:
        """A tensor on the device, or a list of tensors for a slice."""
        if isinstance(index, slice):
            return [self[number] for number in range(*index.indices(self._count))]
        if not -self._count <= index < self._count:
            raise IndexError(index)
        index %= self._count
        if self._held:
            return self._held[index].to(self.device)
        assert self._file is not None
        return self._read(self._file, index).to(self.device)

    def view(self, count: int, home: torch.device | Path) -> TensorStore:
        """The first `count` tensors, without a copy: replacing them, in `home`, leaves these as
        they are. It is good while these are not replaced.
        """
        twin = TensorStore(self.device, home, self.name)
        twin._held, twin._file, twin._kind = self._held[:count], self._file, self._kind
        twin._count = min(count, self._count)
        return twin

    def append(self, tensor: Tensor) -> None:
        """Add a tensor after the last."""
        if isinstance(self.home, Path):
            self._file = self._file or self._path()
            self._write(self._file, tensor)
        else:
            self._held.append(tensor.contiguous().to(self.home))
        self._kind = (tensor.shape, tensor.dtype)
        self._count += 1

    @contextmanager
    def rewriting(self) -> Iterator[Put]:
        """Inside the `with`, every tensor is replaced, in order; one that was not yet can be read.

        On disk the old ones stay until `forget`.
        """
        self._generation += 1
        if not isinstance(self.home, Path):
            yield self._hold
            return
        self._digest = hashlib.sha256()
        new = self._path()
        with new.open("wb") as file:
            yield lambda _, tensor: self._put(file, tensor)
        self._file = new

    def _hold(self, number: int, tensor: Tensor) -> None:
        assert not isinstance(self.home, Path)
        self._held[number] = tensor.contiguous().to(self.home)

    def save(self, folder: Path) -> dict[str, Any]:
        """Force them to disk, in `folder`; returns what `load` needs to find and check them there,
        as JSON values.
        """
        if not isinstance(self.home, Path):
            self._file, self._digest = self._path(folder), hashlib.sha256()
            with self._file.open("wb") as file:
                for batch in self._held:
                    self._put(file, batch)
        assert self._file is not None
        assert self._kind is not None
        with self._file.open("rb") as file:
            os.fsync(file.fileno())
        shape, dtype = self._kind
        return {
            "name": self.name, "generation": self._generation, "batches": self._count,
            "shape": list(shape),
            "dtype": str(dtype).removeprefix("torch."), "sha256": self._digest.hexdigest(),
        }  # fmt: skip

    def load(self, folder: Path, saved: dict[str, Any]) -> None:
        """Become what `save` wrote, of these or others. Raises OutputError where the file is not
        that.
        """
        self._generation, self._count = saved["generation"], saved["batches"]
        self._kind = (torch.Size(saved["shape"]), getattr(torch, saved["dtype"]))
        self._file, self._held, self._digest = (
            self._path(folder, saved["name"]),
            [],
            hashlib.sha256(),
        )
        try:
            whole = self._file.stat().st_size == self._count * self._nbytes()
            for number in range(self._count if whole else 0):
                batch = self._read(self._file, number)
                self._digest.update(tensor_bytes(batch))
                if not isinstance(self.home, Path):
                    self._held.append(batch.to(self.home))
        except OSError:
            whole = False
        if not whole or self._digest.hexdigest() != saved["sha256"]:
            raise OutputError(
                f"the work state {folder} is damaged: {self._file.name} is not what was written; "
                f"remove {folder} to start anew"
            )

    def forget(self, folder: Path) -> None:
        """Remove the files of earlier blocks."""
        for path in folder.glob(f"{self.name}-*"):
            if path != self._file:
                path.unlink()

    def _path(self, folder: Path | None = None, name: str = "") -> Path:
        folder = folder or (self.home if isinstance(self.home, Path) else Path())
        return folder / f"{name or self.name}-{self._generation:05}"

    def _nbytes(self) -> int:
        assert self._kind is not None
        shape, dtype = self._kind
        return shape.numel() * dtype.itemsize

    def _read(self, path: Path, number: int) -> Tensor:
        """Batch `number`, in memory of its own: aligned as torch aligns what it makes."""
        assert self._kind is not None
        batch = torch.empty(self._kind[0], dtype=self._kind[1])
        with path.open("rb") as file:
            file.seek(number * self._nbytes())
            if file.readinto(tensor_bytes(batch)) != self._nbytes():
                raise OutputError(f"{path} became shorter while it was used")
        return batch

    def _write(self, path: Path, tensor: Tensor) -> None:
        with path.open("ab" if self._count else "wb") as file:
            self._put(file, tensor)

    def _put(self, file: BinaryIO, tensor: Tensor) -> None:
        raw = tensor_bytes(tensor)
        file.write(raw)
        self._digest.update(raw)
