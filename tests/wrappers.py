"""Every multimodal model type of transformers, tiny and random: its settings, and how it is
written. `tests.family_trial.tried(kind, place, wrapper)` tries one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.family_trial import randomise
from tests.shrunken_configs import DROP, QWEN4, random_model, shrunken


def _mrope(*sections: int) -> dict[str, Any]:
    """Settings of a text model whose rotary angles count time, height and width."""
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": list(sections)}
    return {"rope_parameters": rope}


_GLM = {"text_config": {**_mrope(2, 1, 1), "partial_rotary_factor": 0.5}}
_GEMMA_E = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "global_head_dim": 32,
}
_DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_BY_KIND = {"full_attention": _DEFAULT_ROPE, "sliding_attention": _DEFAULT_ROPE}
_ALTERNATING = {"layer_types": ["full_attention", "sliding_attention"] * 2}
_QWEN_LAYERS = {"layer_types": ["linear_attention"] * 3 + ["full_attention"]}
_NEMOTRON_H = {
    "model_type": "nemotron_h",
    "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
    "n_groups": 2,
    "mamba_head_dim": 16,
}
_INDEXED = {
    "num_key_value_heads": 4,
    "qk_nope_head_dim": 8,
    "index_head_dim": 16,
    "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
}

_LARGEST = 20_000_000  # parameters of what is still called tiny

SETTINGS: dict[str, dict[str, Any]] = {
    "chameleon": {
        "image_token_id": 100,
        "vocabulary_map": {"<image>": 100},
        "vq_config": {"base_channels": 32, "num_embeddings": 16, "channel_multiplier": [1, 1]},
    },
    "cohere2_vision": {"alignment_intermediate_size": 128},
    "cohere_compass": {"text_config": {"rope_parameters": _BY_KIND, **_ALTERNATING}},
    "cosmos3_edge": {"text_config": _mrope(2, 3, 3), "projector_hidden_size": 64},
    "deepseek_ocr2": {"text_config": {"mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]}},
    "diffusion_gemma": {
        "text_config": {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 32}
    },
    "dots3_note": {
        "text_config": {**_INDEXED, "head_dim": 16, "per_layer_config": {}},
        "vision_config": {"per_layer_config": {}, "adapter_in_dim": 64, "adapter_out_dim": 64},
        "audio_config": {"num_key_value_heads": 4, "adapter_input_size": 64, "adapter_out_dim": 64},
    },
    "emu3": {
        "image_token_id": 100,
        "vocabulary_map": {"<image>": 100},
        "vq_config": {"base_channels": 32, "codebook_size": 16, "channel_multiplier": [1, 1]},
    },
    "ernie4_5_vl_moe": {
        "text_config": {
            **_mrope(2, 2, 4),
            "moe_intermediate_size": [32, 32],
            "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"],
        }
    },
    "florence2": {
        "vision_config": {
            "patch_size": DROP,
            "depths": [1, 1, 1, 1],
            "embed_dim": [16, 16, 32, 64],
            "num_heads": [2, 2, 2, 2],
            "num_groups": [2, 2, 2, 2],
        },
    },
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 16}},
    "gemma4": {"text_config": _GEMMA_E, "vision_config": {"position_embedding_size": 64}},
    "gemma4_unified": {"vision_config": {"mm_embed_dim": 64, "mm_posemb_size": 16}},
    "glm46v": _GLM,
    "glm4v": _GLM,
    "glm4v_moe": _GLM,
    "glm5_next": {
        "text_config": {
            **_INDEXED,
            "qk_rope_head_dim": 0,
            "qk_head_dim": 8,
            "v_head_dim": 8,
            "linear_head_dim": 16,
            "linear_num_heads": 4,
            "index_kpool": 2,
            "head_dim": 0,
        }
    },
    "glm_ocr": _GLM,
    "glmga": _GLM,
    "granite4_vision": {"downsample_rate": "1/2", "deepstack_layer_map": [[0, 1]]},
    "hunyuan_vl": {"text_config": {"head_dim": 16, **_mrope(2, 3, 3)}},
    "inkling2": {
        "text_config": {"unpadded_vocab_size": 128},
        "vision_config": {"text_hidden_size": 64},
    },
    "janus": {"vq_config": {"base_channels": 32, "num_embeddings": 16}},
    "kimi_k25": {"text_config": {"head_dim": 8}},
    "kyutai_speech_to_text": {"codec_config": {"upsample_groups": 64, "num_filters": 4}},
    "llama4": {"vision_config": {"vision_output_dim": 64, "projector_output_dim": 64}},
    "mistral_large4": {"text_config": {"num_key_value_heads": 4, "head_dim": 8}},
    "molmo2": {
        "vision_config": {"image_size": [32, 32], "num_position_embeddings": 4},
        "adapter_config": {"vision_feature_layer": [2, 1], "text_hidden_size": 64},
    },
    "muse_glimmer": {"vision_adapter_intermediate_size": 64},
    "nemotron_h_omni": {
        "text_config": _NEMOTRON_H,
        "vision_config": {
            "model_type": "radio",
            "video_temporal_patch_size": 2,
            "max_img_size": 64,
        },
        "projector_hidden_size": 64,
    },
    "paddleocr_vl": {"text_config": _mrope(2, 3, 3)},
    "qwen3_omni_moe": {
        "talker_config": {
            "text_config": {"shared_expert_intermediate_size": 48},
            "spatial_merge_size": 2,
        },
        "code2wav_config": {"decoder_dim": 64},
    },
    "qwen2_5_omni_thinker": {"text_config": _mrope(2, 3, 3)},
    "qwen2_5_vl": {"text_config": _mrope(2, 3, 3)},
    "qwen2_vl": {"text_config": _mrope(2, 3, 3)},
    "qwen3_5": {"text_config": _QWEN_LAYERS},
    "qwen3_5_moe": {"text_config": _QWEN_LAYERS},
    "qwen3_vl_moe": {"text_config": {"moe_intermediate_size": 48}},
    "qwen4_exp": {"text_config": QWEN4},
    "step3p7": {"text_config": {"sliding_window": 8}},
}
"""What no general tiny value fits, by model type."""


_STACKED = "weights stacked in this way are not supported"
_IMAGE = "does not compute on text alone"
_TWO_SIDES = "is an encoder-decoder"

REFUSED: dict[str, str] = {
    "blip": "blocks that attend to what another model gives",
    "blip-2": _IMAGE,
    "diffusion_gemma": "computes with weights of its blocks, or of parts that text does not need",
    "ernie4_5_vl_moe": _STACKED,
    "florence2": _TWO_SIDES,
    "idefics": _IMAGE,
    "inkling2": _STACKED,  # gate and up are interleaved on disk
    "inkling_mm_model": _STACKED,
    "instructblip": _IMAGE,
    "instructblipvideo": _IMAGE,
    "kosmos-2": _IMAGE,
    "mllama": "blocks that attend to what another model gives",
    "pi0": "does not say how many decoder blocks it has",
    "pix2struct": _TWO_SIDES,
    "pp_formulanet": _TWO_SIDES,
    "qwen3_omni_moe": _IMAGE,
    "shieldgemma2": "tensors of a shieldgemma2 model",  # a classifier, with names of its own
    "t5gemma2": _TWO_SIDES,
    "udop": _TWO_SIDES,
    "vision-encoder-decoder": _TWO_SIDES,
    "voxtral_realtime": _IMAGE,
}
"""Types that are refused, and a part of the line."""

_TIMM = "its vision tower needs timm"
UNBUILT: dict[str, str] = {
    "evolla": "no auto class of transformers takes it",
    "fast_vlm": _TIMM,
    "gemma3n": _TIMM,
    "kyutai_speech_to_text": "its tokens are those of text and of sound at once",
    "muse_spark": "sizes that no setting makes small",
    "nemo_speechlm": "its configs do not fit together",
    "perception_lm": _TIMM,
    "qwen2_5_omni": "sizes that no setting makes small",
    "vibevoice_asr": "sizes that no setting makes small",
}
"""Types of which no tiny model is made here, and why."""


def wrapper_types() -> list[str]:
    """Every multimodal model type that the installed transformers knows."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES)


def wrapper(kind: str) -> Any:
    """A tiny multimodal model in float32. Raises whatever its class does where sizes do not fit."""
    from transformers import AutoModelForMultimodalLM

    config = shrunken(kind, **SETTINGS.get(kind, {}))
    return random_model(AutoModelForMultimodalLM, config, _LARGEST)


def build_wrapper(kind: str, folder: Path) -> Path:
    """Write a random checkpoint of a multimodal type in several shards; returns its folder."""
    model = wrapper(kind)
    randomise(model)
    model.save_pretrained(folder, max_shard_size="400KB")
    return folder
