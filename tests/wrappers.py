"""Every multimodal model type of transformers, tiny and random: its settings, and how it is
written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.shrunken import tiny_config

_MROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]}
_GEMMA_E = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "global_head_dim": 32,
}
_QWEN_LAYERS = {"layer_types": ["linear_attention"] * 3 + ["full_attention"]}

SETTINGS: dict[str, dict[str, Any]] = {
    "gemma4": {"text_config": _GEMMA_E, "vision_config": {"position_embedding_size": 64}},
    "qwen2_5_vl": {"text_config": {"rope_parameters": _MROPE}},
    "qwen3_5": {"text_config": _QWEN_LAYERS},
    "qwen3_5_moe": {"text_config": _QWEN_LAYERS},
}
"""What no general tiny value fits, by model type."""


def wrapper_types() -> list[str]:
    """All multimodal model types that the installed transformers knows."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES)


def build_wrapper(model_type: str, folder: Path, dtype: Any = None) -> Path:
    """Write a random checkpoint of a multimodal type in several shards; returns its folder."""
    import torch
    from transformers import AutoModelForMultimodalLM

    torch.manual_seed(0)
    config = tiny_config(model_type, SETTINGS.get(model_type))
    model = AutoModelForMultimodalLM.from_config(config, dtype=dtype or torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.nan_to_num_(0, 0, 0).add_(torch.randn_like(parameter) * 0.05)
    model.save_pretrained(folder, max_shard_size="400KB")
    return folder
