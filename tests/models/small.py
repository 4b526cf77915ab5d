"""Configurations of small models, one of every family."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from elastic_ep.models.config_json import ConfigFields
from elastic_ep.models.registry import FAMILIES
from elastic_ep.models.spec import ModelSpec

COMMON: dict[str, Any] = {
    "vocab_size": 211,
    "hidden_size": 64,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_experts_per_tok": 3,
    "max_position_embeddings": 512,
    "eos_token_id": None,
    "pad_token_id": None,
    "bos_token_id": None,
}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
ROPE = {"rope_type": "default", "rope_theta": 500.0}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 500.0,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
    "beta_fast": 8.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LATENT = {
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 12,
    "n_routed_experts": 12,
    "n_shared_experts": 2,
    "moe_intermediate_size": 40,
    "first_k_dense_replace": 1,
    "rope_parameters": ROPE,
}
GROUPS = {"n_group": 4, "topk_group": 2}
QWEN2 = {
    **HEADS,
    "num_experts": 9,
    "moe_intermediate_size": 40,
    "shared_expert_intermediate_size": 56,
}
OWN: dict[str, dict[str, Any]] = {
    "qwen3_moe": {**HEADS, "num_experts": 9, "moe_intermediate_size": 40},
    "mixtral": {**HEADS, "num_local_experts": 9},
    "olmoe": {**HEADS, "num_experts": 9},
    "qwen2_moe": QWEN2,
    "deepseek_v2": LATENT,
    "deepseek_v3": {**LATENT, **GROUPS},
    "gpt_oss": {
        **HEADS,
        "head_dim": 16,
        "num_local_experts": 9,
        "sliding_window": 37,
        "rope_parameters": None,
    },
    "glm4_moe": {
        **HEADS,
        "head_dim": 24,
        "n_routed_experts": 12,
        "n_shared_experts": 1,
        "moe_intermediate_size": 40,
        "rope_parameters": {**ROPE, "partial_rotary_factor": 0.5},
    },
    "phimoe": {
        **HEADS,
        "num_local_experts": 9,
        "num_experts_per_tok": 2,
        "router_jitter_noise": 0.2,
    },
    "granitemoe": {**HEADS, "num_local_experts": 9},
    "ernie4_5_moe": {
        **HEADS,
        "moe_num_experts": 9,
        "moe_k": 3,
        "moe_intermediate_size": 40,
    },
    "minimax_m2": {
        **HEADS,
        "head_dim": 24,
        "rotary_dim": 12,
        "num_local_experts": 9,
    },
    "llama4_text": {
        **HEADS,
        "head_dim": 16,
        "num_experts_per_tok": 1,
        "num_local_experts": 9,
        "intermediate_size_mlp": 56,
        "no_rope_layers": [1, 0, 1],
        "attention_chunk_size": 37,
        "floor_scale": 20,
        "rope_parameters": ROPE,
    },
}
"""Of each family's small model, beside what all have."""


def small_spec(family: str, **settings: Any) -> ModelSpec:
    (reader,) = (one.read for one in FAMILIES if family == one.MODEL_TYPE)
    spec: ModelSpec = reader(ConfigFields(Path("small/config.json"), {**COMMON, **OWN[family], **settings}))
    return spec
