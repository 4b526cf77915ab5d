"""GLM-4.5 and 4.6: half of a head is rotated, DeepSeek-V3's gate, queries and keys normed by head in some sizes.

Layers that predict further tokens (MTP) are left alone.
"""

from __future__ import annotations

from elastic_ep.models.config_json import ConfigFields
from elastic_ep.models.decoder import Extras, MoeNames, decoder
from elastic_ep.models.decoder_config import (
    dense_inner,
    first_dense,
    full_attention,
    grouped_gate,
    read_config,
)
from elastic_ep.models.deepseek_v3 import sigmoid_gate
from elastic_ep.models.spec import ModelSpec, QkNorm, Shared

ARCHITECTURE, MODEL_TYPE = "Glm4MoeForCausalLM", "glm4_moe"
NAMES = MoeNames("mlp", "gate_proj", "up_proj", "down_proj")


def read(fields: ConfigFields) -> ModelSpec:
    fields.allow("hidden_act", None, "silu")
    full_attention(fields)
    config = read_config(
        fields,
        inner="moe_intermediate_size",
        experts=("n_routed_experts", "num_local_experts", "num_experts"),
        norm_by_default=True,
        default_eps=1e-5,
        default_theta=10_000.0,
        rotary_share=0.5,
    )
    gate = grouped_gate(fields, sigmoid_gate(fields, 1.0), config.num_experts, config.num_experts_per_tok, 1)
    dense = first_dense(fields, 1)
    extras = Extras(
        qkv_bias=fields.boolean("attention_bias", False),
        gate=gate,
        shared=Shared(config.moe_intermediate_size * fields.positive("n_shared_experts", 1, most=1024)),
        dense_layers=dense,
        dense_inner=dense_inner(fields, dense),
    )
    norm = QkNorm.HEAD if fields.boolean("use_qk_norm", False) else QkNorm.NONE
    return decoder(MODEL_TYPE, config, NAMES, qk_norm=norm, extras=extras)
