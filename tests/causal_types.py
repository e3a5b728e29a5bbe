"""Every causal model type of transformers, tiny and random."""

from __future__ import annotations

from typing import Any

from tests.shrunken import VOCABULARY, tiny_config

_MLA = {"head_dim": 8, "num_key_value_heads": 4}
_INDEXED = {**_MLA, "index_head_dim": 16, "num_hidden_layers": 5}
_SHARED_KEYS = {
    "num_kv_shared_layers": 2,
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
}
_QWEN4 = {
    "num_hidden_layers": 4,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 32,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
    "ngram_vocab_size_base": 64,
    "make_ngram_vocab_size_divisible_by": 8,
    "heads_per_ngram": 2,
    "hc_lowrank": 8,
    "hc_count": 2,
    "output_gate_type": "sigmoid",
}
_PLAIN_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_NOTE = {
    "num_key_value_heads": 4,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "head_dim": 16,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "per_layer_config": {},
}

_DECODER = {"is_decoder": True}  # bert and its like are encoders unless told otherwise

_ENCODERS = (
    "bert bert-generation big_bird camembert data2vec-text electra ernie megatron-bert rembert "
    "roberta roberta-prelayernorm roc_bert roformer xlm-roberta xlm-roberta-xl"
)

SETTINGS: dict[str, dict[str, Any]] = {
    **{kind: {**_DECODER, "pad_token_id": 1} for kind in _ENCODERS.split()},
    "axk1": {"head_dim": 8},
    "axk2": _INDEXED,
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": _PLAIN_ROPE, "sliding_attention": _PLAIN_ROPE},
        "layer_types": ["full_attention", "sliding_attention"] * 2,
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {
            "hidden_size": 64,
            "ffn_hidden_size": 96,
            "moe_num_experts": 4,
            "moe_top_k": 2,
        },
    },
    "blt": {"encoder_hash_byte_group_vocab": 64, "encoder_hash_byte_group_size": [3, 4]},
    "deepseek_v3": {"head_dim": 8},
    "deepseek_v32": _INDEXED,
    "dots3_note": {"text_config": {**_NOTE, "per_layer_config": {"0": {"q_lora_rank": 16}}}},
    "dots3_note_text": _NOTE,
    "gemma3n_text": {**_SHARED_KEYS, "activation_sparsity_pattern": [0.0] * 6},
    "gemma4_assistant": {
        "text_config": {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}
    },
    "gemma4_text": _SHARED_KEYS,
    "glm_moe_dsa": {**_INDEXED, "indexer_types": ["full"] * 3 + ["shared"] * 2},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "inkling2_text": {"unpadded_vocab_size": VOCABULARY},
    "inkling_text": {"unpadded_vocab_size": VOCABULARY},
    "lfm2_moe": {
        "layer_types": ["conv", "conv", "full_attention", "conv"],
        "rope_parameters": _PLAIN_ROPE,
    },
    "kimi_linear": {
        "linear_head_dim": 16,
        "linear_num_heads": 4,
        "layer_types": ["linear_attention"] * 3 + ["full_attention"],
    },
    "longcat_flash": {"head_dim": 8, "num_layers": 2, "zero_expert_num": 2},
    "mamba2": {"head_dim": 32, "num_heads": 4, "n_groups": 2, "expand": 2},
    "ministral": {"head_dim": 16},
    "nemotron_h": {
        "n_groups": 2,
        "layers_block_type": ["mamba", "moe", "attention", "mlp"],
        "num_hidden_layers": 4,
        "n_group": 1,
        "topk_group": 1,
    },
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "reformer": {
        **_DECODER,
        "axial_pos_shape": [4, 4],
        "axial_pos_embds_dim": [32, 32],
    },
    "xmod": {**_DECODER, "languages": ["en_XX"], "default_language": "en_XX"},
    "youtu": {"head_dim": 8},
    "zamba": {
        "num_hidden_layers": 6,
        "attn_layer_period": 3,
        "attn_layer_offset": 2,
        "n_mamba_heads": 2,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "zamba2": {
        "num_hidden_layers": 6,
        "layers_block_type": ["mamba", "mamba", "hybrid"] * 2,
        "hybrid_layer_ids": [2, 5],
        "layer_types": ...,
        "n_mamba_heads": 4,
        "mamba_headdim": 32,
        "mamba_ngroups": 1,
        "num_mem_blocks": 1,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "zaya": {"num_experts_per_tok": 1},
}
"""What no general tiny value fits, by model type."""

_LARGEST = 60_000_000  # parameters of what is still called tiny


def causal_types() -> list[str]:
    """Every model type of the installed transformers that has a causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def causal(kind: str) -> Any:
    """A tiny causal language model in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    config = tiny_config(kind, SETTINGS.get(kind))
    with torch.device("meta"):
        size = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    if size > _LARGEST:
        raise ValueError(f"its smallest config has {size:,} parameters")
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.float32)
