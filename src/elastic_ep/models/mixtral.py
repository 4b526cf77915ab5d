"""Mixtral: no norm of queries and keys; the chosen experts' softmax weights sum to one."""

from __future__ import annotations

from elastic_ep.models.config_json import ConfigFields
from elastic_ep.models.decoder import DecoderConfig, MoeNames, decoder, read_config
from elastic_ep.models.spec import ModelSpec

ARCHITECTURE, MODEL_TYPE = "MixtralForCausalLM", "mixtral"
NAMES = MoeNames("block_sparse_moe", "w1", "w3", "w2")


def read(fields: ConfigFields) -> ModelSpec:
    fields.allow("hidden_act", None, "silu")
    fields.allow("sliding_window", None)
    config = read_config(
        fields, inner="intermediate_size", norm_topk_prob=True, default_eps=1e-5, default_theta=1e6
    )
    return spec(config)


def spec(config: DecoderConfig) -> ModelSpec:
    return decoder(MODEL_TYPE, config, NAMES)
