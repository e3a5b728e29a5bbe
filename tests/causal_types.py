"""Every causal model type of transformers, tiny and random."""

from __future__ import annotations

from typing import Any

from tests.shrunken_configs import shrunken

_LARGEST = 60_000_000  # parameters of what is still called tiny


def causal_types() -> list[str]:
    """Every model type of the installed transformers that has a causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def causal(kind: str) -> Any:
    """A tiny causal language model in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    config = shrunken(kind)
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > _LARGEST:
        raise ValueError(f"its smallest config has {size:,} parameters")
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
