"""Packed folders made of a plain checkpoint without any calibration: quick, and of any mixture of
forms.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from compressor.checkpoint.packed_config import compressed_config, module_entry, place
from compressor.formats.armor import Armor
from compressor.formats.lowrank import LowRank
from compressor.formats.sparse24 import Sparse24
from compressor.methods.pivots import by_pivots


def largest_two(weight):
    """`weight` with all but the two largest of every four columns set to zero."""
    groups = weight.reshape(-1, 4)
    kept = torch.zeros_like(groups, dtype=torch.bool)
    kept.scatter_(1, groups.abs().topk(2, dim=1).indices, True)
    return (groups * kept).reshape(weight.shape)


def near_identity(number, size, generator, dtype):
    noise = torch.randn(number, size, size, generator=generator) / size**0.5
    return (torch.eye(size) + 0.1 * noise).to(dtype)


def stored(form, weight, generator, blocks=(32, 32)):
    """`weight` `[out, in]` as a form: 2:4 by magnitude, ARMOR with wrappers near the identity,
    thin factors of half the rank, or a quarter of it by pivots.
    """
    if form == "sparse24":
        return Sparse24.from_dense(largest_two(weight))
    if form == "armor":
        counts = [size // block for size, block in zip(weight.shape, blocks, strict=True)]
        a, b = (
            near_identity(count, block, generator, weight.dtype)
            for count, block in zip(counts, blocks, strict=True)
        )
        return Armor.from_factors(a, largest_two(weight), b)
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    rank = min(weight.shape) // (4 if form == "pivot" else 2)
    u, v = left[:, :rank] * values[:rank], right[:rank]
    if form == "pivot":
        return by_pivots(u, v, weight.dtype)
    return LowRank(u.to(weight.dtype).contiguous(), v.to(weight.dtype).contiguous())


def pack_folder(source: Path, out: Path, form_of, *, transposed=False, blocks=(32, 32)) -> Path:
    """Pack the linears of `source` for whose name `form_of` gives a form; None leaves one dense."""
    out.mkdir(parents=True)
    for path in source.iterdir():
        if path.suffix != ".safetensors" and path.name != "README.md":
            shutil.copy(path, out / path.name)
    generator, modules, tensors = torch.Generator().manual_seed(0), {}, {}
    with safe_open(source / "model.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118  # not a dictionary
            tensor, linear = file.get_tensor(name), name.removesuffix(".weight")
            form = form_of(linear) if tensor.dim() == 2 else None
            if form is None:
                tensors[name] = tensor
                continue
            weight = tensor.T.contiguous() if transposed else tensor
            packed = stored(form, weight, generator, blocks)
            modules[linear] = module_entry(packed.entry, place(transposed, name, None))
            tensors |= {f"{linear}.{key}": part.clone() for key, part in packed.pack().items()}
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(compressed_config(config, modules)))
    return out
