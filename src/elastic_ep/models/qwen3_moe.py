"""Qwen3-MoE: queries and keys normed by head, a softmax gate."""

from __future__ import annotations

from elastic_ep.models.config_json import ConfigFields
from elastic_ep.models.decoder import DecoderConfig, MoeNames, decoder, read_config
from elastic_ep.models.spec import ModelSpec, QkNorm

ARCHITECTURE, MODEL_TYPE = "Qwen3MoeForCausalLM", "qwen3_moe"
NAMES = MoeNames("mlp", "gate_proj", "up_proj", "down_proj")


def read(fields: ConfigFields) -> ModelSpec:
    fields.allow("decoder_sparse_step", None, 1)
    fields.allow("mlp_only_layers", None, [])
    fields.allow("hidden_act", None, "silu")
    fields.allow("attention_bias", None, False)
    fields.allow("use_sliding_window", None, False)
    return spec(read_config(fields, inner="moe_intermediate_size", default_eps=1e-6, default_theta=10_000.0))


def spec(config: DecoderConfig) -> ModelSpec:
    return decoder(MODEL_TYPE, config, NAMES, qk_norm=QkNorm.HEAD)
