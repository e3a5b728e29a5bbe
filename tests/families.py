"""Tiny configs of decoder families: settings by name, for `transformers.AutoConfig.for_model`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_LLAMA: dict[str, Any] = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    pad_token_id=0,
)
_HEADS = {**_LLAMA, "head_dim": 16}
_GPT = dict(n_embd=64, n_layer=3, n_head=4, n_positions=256, bos_token_id=1, eos_token_id=1)
_FALCON = dict(hidden_size=64, num_hidden_layers=3, num_attention_heads=4)
_EXPERTS = dict(num_experts=4, num_experts_per_tok=2)

CORE: dict[str, dict[str, Any]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _HEADS,
    "gemma2": {**_HEADS, "sliding_window": 8, "query_pre_attn_scalar": 16},
    "phi3": _LLAMA,
    "opt": dict(
        hidden_size=64,
        ffn_dim=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        word_embed_proj_dim=64,
        max_position_embeddings=256,
        pad_token_id=1,
    ),
    "gpt_neox": dict(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=256,
    ),
    "falcon": {**_FALCON, "num_kv_heads": 2, "new_decoder_architecture": True, "alibi": False},
    "gpt2": _GPT,
    "mixtral": {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {**_HEADS, **_EXPERTS, "moe_intermediate_size": 32},
    "gpt_oss": {**_HEADS, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
}
"""Tested every time."""

MORE: dict[str, dict[str, Any]] = {
    "qwen2 sliding": {
        **_LLAMA,
        "use_sliding_window": True,
        "sliding_window": 8,
        "max_window_layers": 2,
    },
    "gemma": _HEADS,
    "gemma3_text": {
        **_HEADS,
        "sliding_window": 8,
        "sliding_window_pattern": 2,
        "query_pre_attn_scalar": 16,
    },
    "phi": _LLAMA,
    "qwen2_moe": {
        **_LLAMA,
        **_EXPERTS,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
    },
    "olmoe": {**_LLAMA, **_EXPERTS},
    "falcon alibi": {
        **_FALCON,
        "alibi": True,
        "multi_query": False,
        "new_decoder_architecture": False,
    },
    "bloom": dict(hidden_size=64, n_layer=3, n_head=4),
    "gptj": dict(n_embd=64, n_layer=3, n_head=4, rotary_dim=8, n_positions=256),
    "gpt_bigcode": dict(n_embd=64, n_layer=3, n_head=4, n_positions=256),
    "mpt": dict(d_model=64, n_layers=3, n_heads=4, max_seq_len=256),
    "olmo2": _LLAMA,
    "granite": _LLAMA,
    "stablelm": _LLAMA,
    "starcoder2": _LLAMA,
    "cohere": _LLAMA,
    "glm4": _HEADS,
    "smollm3": _LLAMA,
    "ministral": _HEADS,
    "deepseek_v3": dict(
        **_LLAMA,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
        n_shared_experts=1,
    ),
    "granitemoe": {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "phimoe": {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v2": dict(
        **_LLAMA,
        n_routed_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=16,
        n_shared_experts=1,
    ),
    "minimax_m2": {**_HEADS, "num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 8},
    "glm4_moe": {
        **_HEADS,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
    },
    "dots1": {
        **_HEADS,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "first_k_dense_replace": 1,
    },
    "ernie4_5_moe": {**_LLAMA, "moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32},
    "hunyuan_v1_moe": {**_HEADS, "num_experts": 4, "moe_topk": 2},
    "qwen3_next": {
        **_HEADS,
        **_EXPERTS,
        "moe_intermediate_size": 32,
        "shared_expert_intermediate_size": 48,
    },
    "llama4_text": {
        **_HEADS,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 96,
    },
    "jamba": {
        **_LLAMA,
        **_EXPERTS,
        "mamba_d_state": 8,
        "mamba_dt_rank": 8,
        "use_mamba_kernels": False,
    },
}
"""Tested on request, with `pytest -m slow`."""

_MLA = dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16)
_INDEXED = dict(
    **{**_LLAMA, "num_hidden_layers": 4, "num_key_value_heads": 4},
    **_MLA,
    head_dim=8,
    moe_intermediate_size=32,
    n_routed_experts=4,
    n_shared_experts=1,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    index_topk=4,
    index_head_dim=16,
    index_n_heads=2,
    indexer_types=["full", "full", "shared", "shared"],
    mlp_layer_types=["dense", "sparse", "sparse", "sparse"],
)
_GEMMA_E = {
    **_HEADS,
    "num_hidden_layers": 6,
    "sliding_window": 8,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 128,
}

HANDING: dict[str, dict[str, Any]] = {
    "gemma3n_text": {
        **_GEMMA_E,
        "intermediate_size": [96] * 6,
        "laurel_rank": 16,
        "activation_sparsity_pattern": [0.0] * 6,
    },
    "gemma4_text": {**_GEMMA_E, "global_head_dim": 32},
    "deepseek_v4": {
        **_HEADS,
        "num_hidden_layers": 4,
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "q_lora_rank": 16,
        "o_groups": 2,
        "o_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "sliding_window": 8,
        "index_n_heads": 2,
        "index_head_dim": 8,
        "index_topk": 4,
        "layer_types": ["heavily_compressed_attention"] * 3 + ["compressed_sparse_attention"],
        "mlp_layer_types": ["hash_moe"] * 3 + ["moe"],
    },
    "glm_moe_dsa": _INDEXED,
    "hy_v4": _INDEXED,
    "zaya": {
        **_HEADS,
        "num_experts": 4,
        "num_experts_per_tok": 1,
        "moe_intermediate_size": 32,
        "router_hidden_size": 32,
        "layer_types": ["hybrid"] * 3,
    },
    "openai-gpt": dict(n_embd=64, n_layer=3, n_head=4, n_positions=256),
}
"""Blocks that are called with what depends on the tokens, or that hand more than hidden states to
later ones, or that return a list.
"""

EVERY = CORE | MORE | HANDING


def build(family: str, folder: Path, dtype: Any = None) -> Path:
    """Write a random checkpoint of a family in several shards; returns its folder."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(family.split()[0], vocab_size=128, **EVERY[family])
    model = AutoModelForCausalLM.from_config(config, dtype=dtype or torch.bfloat16)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
        for name, buffer in model.named_buffers():
            if name.endswith("tid2eid"):  # which experts a token goes to
                buffer.copy_(torch.randint(4, buffer.shape))
    model.save_pretrained(folder, max_shard_size="60KB")
    return folder
