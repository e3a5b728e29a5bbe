"""Packed folders of any stored form and family, made without a run: what is computed of a weight
does not matter to those who load it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from compressor.checkpoint.packed_config import compressed_config, module_entry
from compressor.checkpoint.reader import Reader
from compressor.formats.armor import Armor
from compressor.formats.lowrank import LowRank
from compressor.formats.sparse24 import Sparse24
from compressor.methods.pivots import by_pivots
from compressor.model.skeleton import Skeleton
from compressor.pattern import Pattern

FORMS = {
    "2:4": ["sparse24"],
    "armor": ["armor"],
    "low rank": ["lowrank", "pivot"],
    "some dense": ["sparse24", "dense", "dense"],
    "mixed": ["sparse24", "pivot", "armor", "dense", "lowrank"],
}
"""The stored forms that the linears of a folder get in turn; the experts of a block get one."""


def make_packed(source: Path, folder: Path, forms: list[str]) -> Path:
    """Write `folder`: the checkpoint `source` with its linears stored in `forms`, in turn."""
    skeleton = Skeleton(Reader(source))
    generator = torch.Generator().manual_seed(0)
    replaced: dict[str, dict[str, Tensor]] = {}
    entries: dict[str, Mapping[str, Any]] = {}
    turn = cycle(forms)
    for index in range(len(skeleton.blocks)):
        linears = skeleton.linears(index)
        of_experts = next(turn) if any(linear.experts for linear in linears) else ""
        for linear in linears:
            kind = of_experts if linear.experts else next(turn)
            if kind == "dense":
                continue
            form = stored(kind, linear.read(skeleton.reader), generator)
            prefix = linear.tensor.removesuffix("weight")
            replaced[linear.tensor] = {prefix + name: t for name, t in form.pack().items()}
            entries[linear.name] = module_entry(form.entry, linear.place)
    shutil.copytree(source, folder)
    for path in folder.glob("*.safetensors"):
        tensors: dict[str, Tensor] = {}
        for name, tensor in load_file(path).items():
            tensors |= replaced.get(name, {name: tensor})
        save_file({n: t.contiguous() for n, t in tensors.items()}, path, metadata={"format": "pt"})
        if (folder / "model.safetensors.index.json").is_file():
            _index(folder, path.name, list(tensors))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(compressed_config(config, entries), indent=2))
    return folder


def _index(folder: Path, shard: str, names: list[str]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    kept = {name: file for name, file in index["weight_map"].items() if file != shard}
    path.write_text(json.dumps({**index, "weight_map": kept | dict.fromkeys(names, shard)}))


def stored(kind: str, weight: Tensor, generator: torch.Generator) -> Any:
    """A form named `kind` of the shape and dtype of `weight` `[out, in]`."""
    rows, columns = weight.shape
    core = weight * Pattern.parse("2:4").mask_matrix(weight.abs().float())
    if kind == "sparse24":
        return Sparse24.from_dense(core)
    if kind == "armor":
        a, b = (
            torch.eye(8).repeat(size // 8, 1, 1)
            + torch.randn(size // 8, 8, 8, generator=generator) / 16
            for size in (rows, columns)
        )
        return Armor.from_factors(a=a.to(weight.dtype), core=core, b=b.to(weight.dtype))
    u, s, v = torch.linalg.svd(weight.float(), full_matrices=False)
    rank = min(rows, columns) // 2
    left, right = u[:, :rank] * s[:rank], v[:rank]
    if kind == "pivot":
        return by_pivots(left.double(), right.double(), weight.dtype)
    return LowRank(left.to(weight.dtype), right.to(weight.dtype))


def edit_config(folder: Path, change: Any) -> None:
    """Apply `change` to the dictionary that is in config.json."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint folder."""
    return {
        n: t for path in sorted(folder.glob("*.safetensors")) for n, t in load_file(path).items()
    }
