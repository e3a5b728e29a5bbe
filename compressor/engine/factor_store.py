"""Factors of linears on disk, one file a block, from which those of a lower rank are read."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from compressor.formats.pivot import Pivot
from compressor.methods.factor import Factors


class Factored:
    """The factors of linears, in files of `folder`, one a block."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Path] = {}
        self._notes: dict[str, str] = {}

    def keep(self, index: int, linears: dict[str, tuple[Factors, str]]) -> None:
        """Write those of block `index`, each with its note, by the names of the linears."""
        path = self.folder / f"factors-{index:05}.safetensors"
        tensors = {
            f"{name}.{key}": tensor
            for name, (factors, _) in linears.items()
            for key, tensor in factors._asdict().items()
        }
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path)
        self._files |= dict.fromkeys(linears, path)
        self._notes |= {name: note for name, (_, note) in linears.items()}

    def of(self, name: str, rank: int, device: torch.device) -> Pivot:
        """The weight of `rank` that those of the linear `name` make, in their dtype; only that part
        of the file is read.
        """
        with safe_open(self._files[name], framework="pt") as file:
            u, v = file.get_slice(f"{name}.u")[:, :rank], file.get_slice(f"{name}.v")[:rank]
            scale = file.get_slice(f"{name}.scale")[:rank]
        form = Factors(u.to(device), v.to(device), scale.to(device)).form(u.dtype)
        return replace(form, note=self._notes[name])
