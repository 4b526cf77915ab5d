"""MiniMax-M2: part of a head is rotated, queries and keys normed over all heads, a sigmoid gate with a correction."""

from __future__ import annotations

from elastic_ep.models.config_json import ConfigFields
from elastic_ep.models.decoder import Extras, MoeNames, decoder
from elastic_ep.models.decoder_config import full_attention, read_config
from elastic_ep.models.spec import Gate, ModelSpec, QkNorm, Scores

ARCHITECTURE, MODEL_TYPE = "MiniMaxM2ForCausalLM", "minimax_m2"
NAMES = MoeNames(
    "block_sparse_moe",
    "w1",
    "w3",
    "w2",
    correction="e_score_correction_bias",
    fused_correction="mlp.e_score_correction_bias",
)


def read(fields: ConfigFields) -> ModelSpec:
    fields.allow("hidden_act", None, "silu")
    fields.allow("scoring_func", None, "sigmoid")
    full_attention(fields)
    dim = fields.positive("head_dim", 128)
    share = min(1.0, fields.positive("rotary_dim", dim) / dim)
    config = read_config(
        fields,
        inner="intermediate_size",
        norm_topk_prob=True,
        default_eps=1e-6,
        default_theta=5e6,
        default_head_dim=128,
        rotary_share=share,
    )
    extras = Extras(gate=Gate(Scores.SIGMOID, correction=True))
    return decoder(MODEL_TYPE, config, NAMES, qk_norm=QkNorm.PROJECTION, extras=extras)
