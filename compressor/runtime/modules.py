"""The module that stands for a stored form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from compressor.errors import CheckpointError
from compressor_kernels.linear import ArmorLinear, LowRankLinear, Sparse24Linear


def packed_module(name: str, module: Any, entry: Mapping[str, Any]) -> nn.Module:
    """An empty module for the stored form `entry` in place of `module`. Raises CheckpointError."""
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if not isinstance(weight, torch.Tensor) or weight.dim() != 2:
        raise CheckpointError(
            f"config.json names {name!r} as a packed linear, but it is a {type(module).__name__}"
        )
    in_features, out_features = (
        (module.in_features, module.out_features)
        if hasattr(module, "in_features")
        else weight.shape
    )
    common = {"bias": bias is not None, "dtype": weight.dtype, "device": "meta"}
    if entry["format"] == "sparse24":
        return Sparse24Linear(in_features, out_features, **common)
    if entry["format"] == "armor":
        blocks = {key: entry.get(key) for key in ("block_a", "block_b")}
        if all(
            type(size) is int and size > 0 and features % size == 0
            for size, features in zip(blocks.values(), (out_features, in_features), strict=True)
        ):
            return ArmorLinear(in_features, out_features, **blocks, **common)
        raise CheckpointError(
            f"config.json gives {name} wrappers of {blocks}, which do not divide "
            f"{[out_features, in_features]}"
        )
    if entry["format"] == "lowrank":
        rank = entry.get("rank")
        if type(rank) is int and 0 < rank <= min(in_features, out_features):
            return LowRankLinear(in_features, out_features, rank=rank, **common)
        raise CheckpointError(
            f"config.json gives {name} the rank {str(rank)[:50]}, its weight is "
            f"{[out_features, in_features]}"
        )
    raise CheckpointError(
        f"{name} is stored as {entry['format']!r}; this version of compress-llm knows sparse24, "
        f"armor and lowrank: update it"
    )
