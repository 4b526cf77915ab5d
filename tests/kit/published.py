"""Layers of published models, as their `config.json` says: two of them, the first without experts if there are such."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from elastic_ep.models.config_json import ConfigFields
from elastic_ep.models.quantisation import quantised
from elastic_ep.models.registry import FAMILIES
from elastic_ep.models.spec import ModelSpec

_COMMON = {"num_hidden_layers": 2, "max_position_embeddings": 32768, "eos_token_id": None}
_BLOCKS = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]}}
_ROWS = {
    "quantization_config": {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "ignore": ["lm_head"],
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "symmetric": True},
                "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
            }
        },
    }
}

PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3-235B-A22B-FP8": (
        "qwen3_moe",
        {
            "vocab_size": 151936,
            "hidden_size": 4096,
            "num_attention_heads": 64,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 1536,
            "norm_topk_prob": True,
            "rope_theta": 1e6,
            **_BLOCKS,
        },
    ),
    "MiniMax-M2": (
        "minimax_m2",
        {
            "vocab_size": 200064,
            "hidden_size": 3072,
            "num_attention_heads": 48,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "rotary_dim": 64,
            "num_local_experts": 256,
            "num_experts_per_tok": 8,
            "intermediate_size": 1536,
            "rope_theta": 5e6,
            **_BLOCKS,
        },
    ),
    "GLM-4.6-FP8": (
        "glm4_moe",
        {
            "vocab_size": 151552,
            "hidden_size": 5120,
            "intermediate_size": 12288,
            "num_attention_heads": 96,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "n_routed_experts": 160,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 1536,
            "first_k_dense_replace": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "use_qk_norm": True,
            "attention_bias": True,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5},
            **_ROWS,
        },
    ),
    "Qwen2-57B-A14B": (
        "qwen2_moe",
        {
            "vocab_size": 151936,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "num_experts": 64,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 2560,
            "shared_expert_intermediate_size": 20480,
            "rope_theta": 1e6,
        },
    ),
    "ERNIE-4.5-21B-A3B": (
        "ernie4_5_moe",
        {
            "vocab_size": 103424,
            "hidden_size": 2560,
            "intermediate_size": 12288,
            "num_attention_heads": 20,
            "num_key_value_heads": 4,
            "moe_num_experts": 64,
            "moe_k": 6,
            "moe_intermediate_size": 1536,
            "moe_num_shared_experts": 2,
            "rope_theta": 500_000.0,
        },
    ),
    "Granite-3.1-3B-A800M": (
        "granitemoe",
        {
            "vocab_size": 49155,
            "hidden_size": 1536,
            "intermediate_size": 512,
            "num_attention_heads": 24,
            "num_key_value_heads": 8,
            "num_local_experts": 40,
            "num_experts_per_tok": 8,
            "attention_multiplier": 0.015625,
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "logits_scaling": 6.0,
            "tie_word_embeddings": True,
        },
    ),
    "DeepSeek-V3": (
        "deepseek_v3",
        {
            "vocab_size": 129280,
            "hidden_size": 7168,
            "intermediate_size": 18432,
            "num_attention_heads": 128,
            "q_lora_rank": 1536,
            "n_routed_experts": 256,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 2048,
            "first_k_dense_replace": 1,
            "n_group": 8,
            "topk_group": 4,
            "norm_topk_prob": True,
            "rope_scaling": {
                "type": "yarn",
                "factor": 40,
                "original_max_position_embeddings": 4096,
                "beta_fast": 32,
                "beta_slow": 1,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            },
            **_BLOCKS,
        },
    ),
    "DeepSeek-V2-Lite": (
        "deepseek_v2",
        {
            "vocab_size": 102400,
            "hidden_size": 2048,
            "intermediate_size": 10944,
            "num_attention_heads": 16,
            "q_lora_rank": None,
            "n_routed_experts": 64,
            "n_shared_experts": 2,
            "num_experts_per_tok": 6,
            "moe_intermediate_size": 1408,
            "first_k_dense_replace": 1,
        },
    ),
    "Kimi-K2": (
        "deepseek_v3",
        {
            "model_type": "kimi_k2",
            "vocab_size": 163840,
            "hidden_size": 7168,
            "intermediate_size": 18432,
            "num_attention_heads": 64,
            "q_lora_rank": 1536,
            "n_routed_experts": 384,
            "n_shared_experts": 1,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 2048,
            "first_k_dense_replace": 1,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.827,
            "rope_theta": 50_000.0,
            **_BLOCKS,
        },
    ),
    "gpt-oss-20b": (
        "gpt_oss",
        {
            "vocab_size": 201088,
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "num_local_experts": 32,
            "num_experts_per_tok": 4,
            "sliding_window": 128,
            "rope_theta": 150_000.0,
            "quantization_config": {"quant_method": "mxfp4"},
        },
    ),
    "Llama-4-Scout": (
        "llama4_text",
        {
            "vocab_size": 202048,
            "hidden_size": 5120,
            "intermediate_size": 8192,
            "num_attention_heads": 40,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "num_local_experts": 16,
            "num_experts_per_tok": 1,
            "no_rope_layers": [1, 0],
            "attention_chunk_size": 64,
            "floor_scale": 32,
            "rope_theta": 500_000.0,
        },
    ),
    "Phi-3.5-MoE": (
        "phimoe",
        {
            "vocab_size": 32064,
            "hidden_size": 4096,
            "intermediate_size": 6400,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 16,
            "num_experts_per_tok": 2,
            "router_jitter_noise": 0.01,
            "attention_bias": True,
            "lm_head_bias": True,
        },
    ),
    "OLMoE-1B-7B": (
        "olmoe",
        {
            "vocab_size": 50304,
            "hidden_size": 2048,
            "intermediate_size": 1024,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "num_experts": 64,
            "num_experts_per_tok": 8,
        },
    ),
    "Mixtral-8x7B": (
        "mixtral",
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "rope_theta": 1e6,
        },
    ),
}
"""Family and configuration of all that a GPU serves. Llama 4's chunks are short here, so that a test sees several."""


def published(name: str) -> ModelSpec:
    family, settings = PUBLISHED[name]
    (read,) = (one.read for one in FAMILIES if family == one.MODEL_TYPE)
    fields = ConfigFields(Path("config.json"), {**_COMMON, **settings})
    return quantised(read(fields), fields)
