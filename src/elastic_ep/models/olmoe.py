"""OLMoE: queries and keys normed over the whole projection, and clamped if `clip_qkv` says so; a plain softmax gate."""

from __future__ import annotations

from elastic_ep.models.config_json import ConfigFields
from elastic_ep.models.decoder import Extras, MoeNames, decoder
from elastic_ep.models.decoder_config import DecoderConfig, full_attention, read_config
from elastic_ep.models.spec import ModelSpec, QkNorm

ARCHITECTURE, MODEL_TYPE = "OlmoeForCausalLM", "olmoe"
NAMES = MoeNames("mlp", "gate_proj", "up_proj", "down_proj")


def read(fields: ConfigFields) -> ModelSpec:
    fields.allow("hidden_act", None, "silu")
    full_attention(fields)
    config = read_config(fields, inner="intermediate_size", default_eps=1e-5, default_theta=10_000.0)
    clip = fields.number("clip_qkv", 1.0) if fields.has("clip_qkv") else None
    return spec(config, clip, biased=fields.boolean("attention_bias", False))


def spec(config: DecoderConfig, clip_qkv: float | None = None, *, biased: bool = False) -> ModelSpec:
    extras = Extras(qkv_bias=biased, out_bias=biased)
    return decoder(MODEL_TYPE, config, NAMES, qk_norm=QkNorm.PROJECTION, clip_qkv=clip_qkv, extras=extras)
