"""Mixtral: no norm of queries and keys; the chosen experts' softmax weights sum to one; a window if it says so."""

from __future__ import annotations

from elastic_ep.models.config_json import ConfigFields
from elastic_ep.models.decoder import PLAIN, Extras, MoeNames, decoder
from elastic_ep.models.decoder_config import DecoderConfig, full_attention, one_window, read_config
from elastic_ep.models.spec import ModelSpec

ARCHITECTURE, MODEL_TYPE = "MixtralForCausalLM", "mixtral"
NAMES = MoeNames("block_sparse_moe", "w1", "w3", "w2")


def read(fields: ConfigFields) -> ModelSpec:
    fields.allow("hidden_act", None, "silu")
    full_attention(fields)
    config = read_config(
        fields, inner="intermediate_size", norm_topk_prob=True, default_eps=1e-5, default_theta=1e6
    )
    return spec(config, Extras(windows=one_window(fields, config.num_hidden_layers)))


def spec(config: DecoderConfig, extras: Extras = PLAIN) -> ModelSpec:
    return decoder(MODEL_TYPE, config, NAMES, extras=extras)
