"""Qwen3-MoE: queries and keys normed by head, a softmax gate; some layers may have no experts."""

from __future__ import annotations

from elastic_ep.models.config_json import ConfigFields
from elastic_ep.models.decoder import PLAIN, Extras, MoeNames, decoder
from elastic_ep.models.decoder_config import (
    DecoderConfig,
    dense_inner,
    full_attention,
    one_window,
    read_config,
    sparse_layers,
)
from elastic_ep.models.spec import ModelSpec, QkNorm

ARCHITECTURE, MODEL_TYPE = "Qwen3MoeForCausalLM", "qwen3_moe"
NAMES = MoeNames("mlp", "gate_proj", "up_proj", "down_proj")


def read(fields: ConfigFields) -> ModelSpec:
    fields.allow("hidden_act", None, "silu")
    full_attention(fields)
    config = read_config(fields, inner="moe_intermediate_size", default_eps=1e-6, default_theta=10_000.0)
    dense, biased = sparse_layers(fields), fields.boolean("attention_bias", False)
    windowed = fields.boolean("use_sliding_window", False)
    extras = Extras(
        windows=one_window(fields, config.num_hidden_layers, wanted=True) if windowed else (),
        qkv_bias=biased,
        out_bias=biased,
        dense_layers=dense,
        dense_inner=dense_inner(fields, dense),
    )
    return spec(config, extras)


def spec(config: DecoderConfig, extras: Extras = PLAIN) -> ModelSpec:
    return decoder(MODEL_TYPE, config, NAMES, qk_norm=QkNorm.HEAD, extras=extras)
