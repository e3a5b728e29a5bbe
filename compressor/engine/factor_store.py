"""Factors of linears on disk, one file a block, from which those of a lower rank are read."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from compressor.formats.lowrank import LowRank


class Factored:
    """The factors of linears, in files of `folder`, one a block."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files: dict[str, Path] = {}
        self._notes: dict[str, str] = {}

    def keep(self, index: int, forms: dict[str, LowRank]) -> None:
        """Write those of block `index`, by the names of the linears."""
        path = self.folder / f"factors-{index:05}.safetensors"
        tensors = {
            f"{name}.{key}": tensor
            for name, form in forms.items()
            for key, tensor in form.factors().items()
        }
        save_file({name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, path)
        self._files |= dict.fromkeys(forms, path)
        self._notes |= {name: form.note for name, form in forms.items()}

    def of(self, name: str, rank: int, device: torch.device) -> LowRank:
        """Those of the linear `name`, cut to `rank`; only that part of the file is read."""
        with safe_open(self._files[name], framework="pt") as file:
            u, v = file.get_slice(f"{name}.u")[:, :rank], file.get_slice(f"{name}.v")[:rank]
        return LowRank(u.contiguous().to(device), v.contiguous().to(device), self._notes[name])
