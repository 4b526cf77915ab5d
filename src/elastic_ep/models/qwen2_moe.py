"""Qwen2-MoE: biases in queries, keys and values, a shared expert with a gate; some layers may have no experts."""

from __future__ import annotations

from elastic_ep.models.config_json import ConfigFields
from elastic_ep.models.decoder import Extras, MoeNames, decoder
from elastic_ep.models.decoder_config import dense_inner, full_attention, read_config, sparse_layers
from elastic_ep.models.spec import ModelSpec, Shared

ARCHITECTURE, MODEL_TYPE = "Qwen2MoeForCausalLM", "qwen2_moe"
NAMES = MoeNames("mlp", "gate_proj", "up_proj", "down_proj", shared="shared_expert")


def read(fields: ConfigFields) -> ModelSpec:
    fields.allow("hidden_act", None, "silu")
    fields.allow("use_sliding_window", None, False)
    full_attention(fields)
    config = read_config(fields, inner="moe_intermediate_size", default_eps=1e-6, default_theta=10_000.0)
    dense = sparse_layers(fields)
    extras = Extras(
        qkv_bias=fields.boolean("qkv_bias", True),
        shared=Shared(fields.positive("shared_expert_intermediate_size"), gated=True),
        dense_layers=dense,
        dense_inner=dense_inner(fields, dense),
    )
    return decoder(MODEL_TYPE, config, NAMES, extras=extras)
