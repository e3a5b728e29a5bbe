"""Quantised checkpoints made of dense ones, as their publishers write them, with the dense twin
that each stands for: plain loops, block by block.
"""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
FP8: dict[str, Any] = {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e4m3"}
PLAIN = ("embed", "lm_head", "norm", "router", ".mlp.gate.")  # parts of names that stay as they are


def fp8_block(weight, block=(128, 128), *, powers=False):
    """`[out, in]` -> F8_E4M3, a float32 scale for each block, and the dense weight they stand
    for.
    """
    rows, columns = weight.shape
    grid = math.ceil(rows / block[0]), math.ceil(columns / block[1])
    stored = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    dense, scales = torch.empty(weight.shape, dtype=torch.bfloat16), torch.empty(grid)
    for i in range(grid[0]):
        for j in range(grid[1]):
            part = (
                slice(i * block[0], (i + 1) * block[0]),
                slice(j * block[1], (j + 1) * block[1]),
            )
            scale = weight[part].float().abs().max().clamp(min=1e-12) / 448
            scales[i, j] = torch.exp2(torch.ceil(torch.log2(scale))) if powers else scale
            stored[part] = (weight[part].float() / scales[i, j]).to(torch.float8_e4m3fn)
            dense[part] = (stored[part].float() * scales[i, j]).bfloat16()
    return stored, scales, dense


def to_fp8(
    folder: Path,
    out: Path,
    twin: Path,
    block=(128, 128),
    *,
    scale_dtype=torch.float32,
    spelled: str = "weight_scale_inv",
    **described: Any,
) -> None:
    """Write the linears of `folder` in block FP8 to `out`, and what that stands for to `twin`."""
    powers = scale_dtype in (torch.float8_e8m0fnu, torch.uint8)

    def quantise(name, weight):
        matrix = weight.dim() == 2 and name.endswith(".weight")
        if not matrix or any(part in name for part in PLAIN):
            return {name: weight}, {name: weight}
        stored, scales, dense = fp8_block(weight, block, powers=powers)
        scale = name.removesuffix("weight") + spelled
        as_stored = scales.to(torch.float8_e8m0fnu) if powers else scales.to(scale_dtype)
        if scale_dtype == torch.uint8:
            as_stored = as_stored.view(torch.uint8)
        return {name: stored, scale: as_stored}, {name: dense}

    _write(folder, out, twin, quantise, {**FP8, "weight_block_size": list(block), **described})


def mxfp4(weight):
    """`[experts, in, out]` -> blocks and scales as gpt-oss has them, and the dense tensor."""
    experts, columns, rows = weight.shape
    groups = weight.transpose(1, 2).float().reshape(experts, rows, columns // 32, 32)
    power = torch.floor(torch.log2(groups.abs().amax(-1).clamp(min=2**-100))) - 2
    scaled = groups / torch.exp2(power)[..., None]
    codes = (scaled[..., None] - E2M1).abs().argmin(-1)
    blocks = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8)
    scales = (power + 127).to(torch.uint8)
    dense = (E2M1[codes] * torch.exp2(power)[..., None]).reshape(experts, rows, columns)
    return blocks, scales, dense.transpose(1, 2).bfloat16().contiguous()


def to_mxfp4(folder: Path, out: Path, twin: Path) -> None:
    """Write the experts of gpt-oss in `folder` in MXFP4 to `out`, and what that stands for to
    `twin`.
    """

    def quantise(name, weight):
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            return {name: weight}, {name: weight}
        blocks, scales, dense = mxfp4(weight)
        return {f"{name}_blocks": blocks, f"{name}_scales": scales}, {name: dense}

    plain = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens"]
    _write(folder, out, twin, quantise, {"quant_method": "mxfp4", "modules_to_not_convert": plain})


def _write(folder, out, twin, quantise, described):
    """Both folders, shard by shard."""
    for made in (out, twin):
        made.mkdir(parents=True)
        for path in folder.iterdir():
            if path.suffix != ".safetensors":
                shutil.copy(path, made / path.name)
    where: dict[str, str] = {}
    for path in sorted(folder.glob("*.safetensors")):
        stored, dense = {}, {}
        for name, weight in load_file(path).items():
            parts, plain = quantise(name, weight)
            stored |= parts
            dense |= plain
        where |= dict.fromkeys(stored, path.name)
        save_file(stored, out / path.name, {"format": "pt"})
        save_file(dense, twin / path.name, {"format": "pt"})
    index = out / "model.safetensors.index.json"
    if index.is_file():
        index.write_text(json.dumps({"metadata": {}, "weight_map": where}))
    config = json.loads((folder / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**config, "quantization_config": described}))
