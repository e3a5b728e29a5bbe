"""Factors of linears on disk, one file a block, from which those of a lower rank are read, with the
singular values of each.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from compressor.checkpoint.atomic import sha256, sync
from compressor.checkpoint.work_state import damaged
from compressor.formats.pivot import Pivot
from compressor.methods.factor import Factors

FOLDER = "factors"


class Factored:
    """The factors of linears, in files of a folder in `work`, one a block.

    Args:
        work: the work state of the run, or another folder.

    Attributes:
        values: singular values of every linear, float64, by name.
    """

    def __init__(self, work: Path) -> None:
        self.work, self.folder = work, work / FOLDER
        self.values: dict[str, Tensor] = {}
        self._files: dict[str, Path] = {}
        self._notes: dict[str, str] = {}

    def begin(self) -> None:
        """Have an empty folder; what a pass that was cut off left of its own is removed."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()

    def keep(
        self,
        index: int,
        linears: Mapping[str, tuple[Factors, str]],
        values: Mapping[str, Tensor],
    ) -> None:
        """Write those of block `index`, each with a note, and their singular values, by the names
        of the linears. A block of which there are none has no file.
        """
        if not linears:
            return
        path = self._path(index)
        tensors = {
            f"{name}.{key}": tensor
            for name, (factors, _) in linears.items()
            for key, tensor in factors._asdict().items()
        }
        tensors |= {f"{name}.values": each for name, each in values.items()}
        save_file(
            {name: tensor.cpu().contiguous() for name, tensor in tensors.items()},
            path,
            metadata={name: note for name, (_, note) in linears.items()},
        )
        sync(path)
        self._read(path)

    def sums(self) -> dict[str, str]:
        """The sha256 of every file, by its name: what `load` takes."""
        sync(self.folder)
        return {path.name: sha256(path) for path in sorted(self.folder.iterdir())}

    def load(self, sums: Mapping[str, str]) -> None:
        """Have what an earlier run kept. The files of blocks that it finished may be gone.

        Raises:
            OutputError: a file is not what was written.
        """
        for name, digest in sums.items():
            path = self.folder / name
            if path.is_file():
                if sha256(path) != digest:
                    raise damaged(self.work, f"{path} is not what was written")
                self._read(path)

    def drop(self, index: int) -> None:
        """Remove the file of block `index`, which nobody needs any more."""
        self._path(index).unlink(missing_ok=True)

    def of(self, name: str, rank: int, device: torch.device) -> Pivot:
        """The weight of `rank` that those of the linear `name` make, in their dtype; only that part
        of the file is read. Raises OutputError where the file is gone.
        """
        if name not in self._files:
            raise damaged(self.work, f"the factors of {name} are missing")
        with safe_open(self._files[name], framework="pt") as file:
            u, v = file.get_slice(f"{name}.u")[:, :rank], file.get_slice(f"{name}.v")[:rank]
            scale = file.get_slice(f"{name}.scale")[:rank]
        form = Factors(u.to(device), v.to(device), scale.to(device)).form(u.dtype)
        return replace(form, note=self._notes[name])

    def _path(self, index: int) -> Path:
        return self.folder / f"factors-{index:05}.safetensors"

    def _read(self, path: Path) -> None:
        """Learn what is in a file."""
        with safe_open(path, framework="pt") as file:
            notes = file.metadata() or {}
            self._notes |= notes
            self._files |= dict.fromkeys(notes, path)
            self.values |= {name: file.get_tensor(f"{name}.values") for name in notes}
