"""A tiny config of any model type: transformers' own default with every size made small.

Sizes go by many names; `_SIZES` has those that stand for one. What still does not fit together is
set by hand, by type, in `BY_HAND`.
"""

from __future__ import annotations

import inspect
from typing import Any

_VOCABULARY = 128

_SIZES: dict[int, str] = {
    64: "hidden_size d_model n_embd dim model_dim embedding_size emb_dim word_embed_proj_dim "
    "hidden_dim embed_dim n_embed attn_hidden_size lru_width decoder_hidden_size "
    "encoder_hidden_size projection_dim attention_hidden_size d_embedding out_hidden_size "
    "embedding_dim",
    96: "intermediate_size ffn_dim ffn_hidden_size encoder_ffn_dim decoder_ffn_dim n_inner d_ff "
    "dim_ff d_inner mlp_dim intermediate_size_mlp dense_intermediate_size "
    "intermediate_size_dense mlp_intermediate_size block_ff_dim ffn_size intermediate_dim "
    "inner_dim",
    48: "shared_expert_intermediate_size shared_intermediate_size "
    "moe_shared_expert_intermediate_size shared_expert_hidden_size",
    32: "moe_intermediate_size expert_ffn_hidden_size expert_intermediate_size "
    "moe_ffn_hidden_size expert_hidden_size image_size",
    16: "head_dim global_head_dim d_kv kv_channels swa_head_dim swa_v_head_dim v_head_dim "
    "attention_head_size q_lora_rank kv_lora_rank o_lora_rank dim_model_base patch_size "
    "query_pre_attn_scalar hidden_size_per_layer_input laurel_rank",
    8: "qk_rope_head_dim qk_nope_head_dim rotary_dim index_head_dim swa_rope_head_dim "
    "mamba_d_state ssm_state_size state_size mamba_dt_rank time_step_rank d_state "
    "mamba_state_dim linear_key_head_dim linear_value_head_dim sliding_window "
    "attention_window_size local_window_size attention_chunk_size chunk_size mamba_chunk_size "
    "num_mel_bins",
    4: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers "
    "num_decoder_layers num_encoder_layers depth num_attention_heads n_head n_heads num_heads "
    "encoder_attention_heads decoder_attention_heads attention_heads "
    "num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads "
    "num_experts n_routed_experts num_local_experts moe_num_experts num_moe_experts n_experts "
    "index_topk mamba_n_heads mamba_num_heads n_mamba_heads linear_num_value_heads",
    2: "num_key_value_heads num_kv_heads n_kv_heads multi_query_group_num "
    "swa_num_key_value_heads num_global_key_value_heads decoder_key_value_heads "
    "num_experts_per_tok moe_topk moe_k top_k_experts num_experts_per_token experts_per_token "
    "moe_top_k num_selected_experts expert_top_k n_group num_expert_group o_groups "
    "index_n_heads linear_num_key_heads",
    1: "topk_group n_shared_experts num_shared_experts moe_num_shared_experts "
    "first_k_dense_replace num_dense_layers moe_layer_start_index first_dense_layers "
    "num_nextn_predict_layers num_mtp_layers mtp_num_layers num_mtp_modules",
    0: "num_kv_shared_layers",
    256: "max_position_embeddings n_positions max_seq_len n_ctx max_target_positions "
    "max_source_positions max_sequence_length seq_length max_seqlen",
    _VOCABULARY: "vocab_size src_vocab_size tgt_vocab_size decoder_vocab_size "
    "vocab_size_per_layer_input",
}
_SMALL = {name: size for size, names in _SIZES.items() for name in names.split()}
_KEPT_NONE = (
    "head_dim rotary_dim num_kv_shared_layers num_experts num_local_experts "
    "moe_intermediate_size q_lora_rank sliding_window"
)  # their absence means something

DROP = "drop"  # a setting that the default has, and the tiny config must not

_MLA = {"head_dim": 8, "num_key_value_heads": 4}
_INDEXED = {**_MLA, "index_head_dim": 16, "num_hidden_layers": 5}
_SHARED_KEYS = {
    "num_kv_shared_layers": 2,
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
}
QWEN4 = {
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

BY_HAND: dict[str, dict[str, Any]] = {
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
    "dots3_note": {"text_config": _NOTE},
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
    "inkling2_text": {"unpadded_vocab_size": _VOCABULARY},
    "inkling_text": {"unpadded_vocab_size": _VOCABULARY},
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
    "qwen4_exp": {"text_config": {"num_hidden_layers": 4, **QWEN4}},
    "qwen4_exp_text": {"num_hidden_layers": 4, **QWEN4},
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
        "layer_types": DROP,
        "n_mamba_heads": 4,
        "mamba_headdim": 32,
        "mamba_ngroups": 1,
        "num_mem_blocks": 1,
        "attention_hidden_size": 128,
        "attention_head_dim": 32,
    },
    "zaya": {"num_experts_per_tok": 1},
}
"""What is set otherwise than by the name of the size alone; the sizes of inner configs likewise."""


def shrunken(kind: str, **settings: Any) -> Any:
    """The tiny config of a model type. Raises whatever its class does where sizes do not fit."""
    from transformers import CONFIG_MAPPING

    config = CONFIG_MAPPING[kind]
    return config(**_with(_settings(config), {**BY_HAND.get(kind, {}), **settings}))


def _settings(config: type) -> dict[str, Any]:
    """The settings of a config class that are made small, those of inner configs among them."""
    from transformers import CONFIG_MAPPING

    try:
        default = config().to_dict()
    except Exception:  # some cannot be made without settings
        parameters = inspect.signature(config.__init__).parameters
        default = {name: parameter.default for name, parameter in parameters.items()}
    small: dict[str, Any] = {
        name: _SMALL[name]
        for name, value in default.items()
        if name in _SMALL and not (value is None and name in _KEPT_NONE.split())
    }
    small |= _token_ids(default)
    for name, inner in (getattr(config, "sub_configs", None) or {}).items():
        if inner.__name__ != "AutoConfig":
            small[name] = _settings(inner)
        elif isinstance(described := default.get(name), dict):
            kind = described.get("model_type")
            if kind in CONFIG_MAPPING:
                small[name] = {**_settings(CONFIG_MAPPING[kind]), "model_type": kind}
    return small


def _token_ids(default: dict[str, Any]) -> dict[str, Any]:
    """Special tokens beyond the vocabulary, moved into it."""
    known = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    found: dict[str, Any] = {}
    for name, value in default.items():
        if name.endswith("_token_id") and isinstance(value, list):
            found[name] = 2
        elif name.endswith(("_id", "_token_index")) and isinstance(value, int):
            found[name] = value if value < _VOCABULARY else known.get(name, 100 + len(found))
    return found


def _with(settings: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """`settings`, with `others` in their place; within inner configs too."""
    made = dict(settings)
    for name, value in others.items():
        if isinstance(value, dict) and isinstance(made.get(name), dict):
            made[name] = _with(made[name], value)
        elif value == DROP:
            made.pop(name, None)
        else:
            made[name] = value
    return made


def random_model(auto: Any, config: Any, largest: int) -> Any:
    """A model of `config` in float32, made by the class `auto`. Raises ValueError for one of more
    than `largest` parameters.
    """
    import torch

    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in auto.from_config(config).parameters())
    if size > largest:
        raise ValueError(f"its smallest config has {size:,} parameters")
    torch.manual_seed(0)
    return auto.from_config(config, dtype=torch.float32)
