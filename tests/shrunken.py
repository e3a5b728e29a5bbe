"""Tiny configs of any model type of transformers: its default one with every size made small."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

_NAMES: dict[int, str] = {
    1: """
        first_k_dense_replace num_dense_layers moe_layer_start_index first_dense_layers topk_group
        n_shared_experts num_shared_experts moe_num_shared_experts
        num_nextn_predict_layers num_mtp_layers mtp_num_layers num_mtp_modules
    """,
    2: """
        num_key_value_heads num_kv_heads n_kv_heads multi_query_group_num swa_num_key_value_heads
        num_global_key_value_heads decoder_key_value_heads linear_num_key_heads
        num_experts_per_tok moe_topk moe_k top_k_experts num_experts_per_token experts_per_token
        moe_top_k num_selected_experts expert_top_k n_group num_expert_group o_groups index_n_heads
    """,
    4: """
        num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers
        num_decoder_layers num_encoder_layers depth
        num_attention_heads n_head n_heads num_heads encoder_attention_heads
        decoder_attention_heads attention_heads num_encoder_attention_heads
        num_decoder_attention_heads swa_num_attention_heads
        num_experts n_routed_experts num_local_experts moe_num_experts num_moe_experts n_experts
        index_topk mamba_n_heads mamba_num_heads n_mamba_heads linear_num_value_heads
    """,
    8: """
        qk_rope_head_dim qk_nope_head_dim rotary_dim index_head_dim swa_rope_head_dim
        mamba_d_state ssm_state_size state_size mamba_dt_rank time_step_rank d_state mamba_state_dim
        linear_key_head_dim linear_value_head_dim sliding_window attention_window_size
        local_window_size attention_chunk_size chunk_size mamba_chunk_size num_mel_bins
    """,
    16: """
        head_dim global_head_dim d_kv kv_channels swa_head_dim swa_v_head_dim v_head_dim
        attention_head_size q_lora_rank kv_lora_rank o_lora_rank dim_model_base laurel_rank
        query_pre_attn_scalar hidden_size_per_layer_input patch_size
    """,
    32: """
        moe_intermediate_size expert_ffn_hidden_size expert_intermediate_size
        moe_ffn_hidden_size expert_hidden_size image_size
    """,
    48: """
        shared_expert_intermediate_size shared_intermediate_size
        moe_shared_expert_intermediate_size shared_expert_hidden_size
    """,
    64: """
        hidden_size d_model n_embd dim model_dim embedding_size emb_dim word_embed_proj_dim
        hidden_dim embed_dim n_embed attn_hidden_size lru_width decoder_hidden_size
        encoder_hidden_size projection_dim attention_hidden_size d_embedding out_hidden_size
        embedding_dim
    """,
    96: """
        intermediate_size ffn_dim ffn_hidden_size encoder_ffn_dim decoder_ffn_dim n_inner d_ff
        dim_ff d_inner mlp_dim intermediate_size_mlp dense_intermediate_size
        intermediate_size_dense mlp_intermediate_size block_ff_dim ffn_size intermediate_dim
        inner_dim
    """,
    128: """
        vocab_size src_vocab_size tgt_vocab_size decoder_vocab_size vocab_size_per_layer_input
    """,
    256: """
        max_position_embeddings n_positions max_seq_len n_ctx max_target_positions
        max_source_positions max_sequence_length seq_length max_seqlen
    """,
}
SIZES = {name: size for size, names in _NAMES.items() for name in names.split()} | {
    "num_kv_shared_layers": 0
}
"""A tiny value for every setting that goes by one of these names."""

VOCABULARY = 128
_OPTIONAL = {  # absent, they change what the model is
    "head_dim",
    "rotary_dim",
    "num_kv_shared_layers",
    "num_experts",
    "num_local_experts",
    "moe_intermediate_size",
    "q_lora_rank",
    "sliding_window",
}
_KNOWN_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def settings_of(kind: Any, more: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The settings of a tiny model of a config class, with `more`, which goes as deep as configs
    within configs do; a setting that is `...` there is left as the class has it.
    """
    defaults = _defaults(kind)
    settings: dict[str, Any] = {
        name: SIZES[name]
        for name, value in defaults.items()
        if name in SIZES and not (value is None and name in _OPTIONAL)
    }
    settings |= _token_ids(defaults)
    for name, part in (getattr(kind, "sub_configs", None) or {}).items():
        deeper = (more or {}).get(name, {})
        inner = None if deeper is None else _config_class(part, deeper or defaults.get(name))
        if inner is not None:
            settings[name] = {**settings_of(inner, deeper), "model_type": inner.model_type}
    for name, value in (more or {}).items():
        if value is ...:
            settings.pop(name, None)
        elif not (isinstance(value, dict) and name in settings and "model_type" in settings[name]):
            settings[name] = value
    return settings


def tiny_config(model_type: str, more: Mapping[str, Any] | None = None) -> Any:
    """The config of a tiny model of a type; `more` as in `settings_of`."""
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[model_type]
    return kind(**settings_of(kind, more))


def _defaults(kind: Any) -> dict[str, Any]:
    try:
        return kind().to_dict()
    except Exception:  # it has no defaults for everything
        parameters = inspect.signature(kind.__init__).parameters.items()
        return {name: parameter.default for name, parameter in parameters}


def _config_class(part: Any, chosen: Any) -> Any:
    """The class of a config within a config; None where that may be any and none is chosen."""
    from transformers import CONFIG_MAPPING

    kind = chosen.get("model_type") if isinstance(chosen, dict) else None
    if kind and kind in CONFIG_MAPPING:
        return CONFIG_MAPPING[kind]
    return None if part.__name__ == "AutoConfig" else part


def _token_ids(defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Ids of special tokens that are in the tiny vocabulary."""
    found: dict[str, Any] = {}
    for name, value in defaults.items():
        if not name.endswith(("_token_id", "_token_index", "_id")):
            continue
        if isinstance(value, int) and value >= VOCABULARY:
            found[name] = _KNOWN_IDS.get(name, 100 + len(found))
        elif isinstance(value, list):
            found[name] = 2
    return found
