"""Every causal model type of transformers, tiny and random."""

from __future__ import annotations

from typing import Any

from tests.shrunken_configs import random_model, shrunken

_LARGEST = 60_000_000  # parameters of what is still called tiny


def causal_types() -> list[str]:
    """Every model type of the installed transformers that has a causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def causal(kind: str) -> Any:
    """A tiny causal language model in float32."""
    from transformers import AutoModelForCausalLM

    return random_model(AutoModelForCausalLM, shrunken(kind), _LARGEST)
