"""PhiMoE: norms with mean and bias, two experts chosen by a sparse mixer, whose threshold is the jitter of training."""

from __future__ import annotations

from elastic_ep.models.config_json import ConfigFields
from elastic_ep.models.decoder import Extras, MoeNames, decoder
from elastic_ep.models.decoder_config import full_attention, one_window, read_config
from elastic_ep.models.spec import Gate, ModelSpec, Norm, Scores

ARCHITECTURE, MODEL_TYPE = "PhimoeForCausalLM", "phimoe"
NAMES = MoeNames("block_sparse_moe", "w1", "w3", "w2", fused_gate="mlp.router")


def read(fields: ConfigFields) -> ModelSpec:
    fields.allow("hidden_act", None, "silu")
    fields.allow("num_experts_per_tok", None, 2)
    full_attention(fields)
    config = read_config(
        fields,
        inner="intermediate_size",
        norm_topk_prob=False,
        default_eps=1e-5,
        default_theta=1e6,
        default_top_k=2,
    )
    biased = fields.boolean("attention_bias", False)
    extras = Extras(
        windows=one_window(fields, config.num_hidden_layers),
        qkv_bias=biased,
        out_bias=biased,
        gate=Gate(Scores.SPARSE_MIXER, jitter=fields.number("router_jitter_noise", 0.01, 0.0, 1e3)),
        norm=Norm.LAYER,
        head_bias=fields.boolean("lm_head_bias", False),
    )
    return decoder(MODEL_TYPE, config, NAMES, extras=extras)
