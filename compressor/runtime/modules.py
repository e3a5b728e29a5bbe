"""The module that stands for a stored form."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from compressor.errors import CheckpointError
from compressor.formats import PACKED, form_class


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
    if entry["format"] not in PACKED:
        raise CheckpointError(
            f"{name} is stored as {entry['format']!r}; this version of compress-llm knows "
            f"{', '.join(PACKED[:-1])} and {PACKED[-1]}: update it"
        )
    form = form_class(entry["format"])
    try:
        form.check_entry(entry, (out_features, in_features))
    except ValueError as error:
        raise CheckpointError(f"config.json gives {name} {error}") from None
    common = {"bias": bias is not None, "dtype": weight.dtype, "device": "meta"}
    return form.module(entry, in_features, out_features, **common)
