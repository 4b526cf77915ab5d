"""DeepSeek-V3, R1, V3.1 and Kimi-K2: as V2, with a sigmoid gate, corrected for the choice, within the best groups.

Layers that predict further tokens (MTP) are left alone.
"""

from __future__ import annotations

from elastic_ep.models.config_json import ConfigFields
from elastic_ep.models.decoder import decoder
from elastic_ep.models.decoder_config import first_dense, grouped_gate
from elastic_ep.models.deepseek_v2 import NAMES, latent_config, latent_extras
from elastic_ep.models.spec import Gate, ModelSpec, Scores

ARCHITECTURE, MODEL_TYPE = "DeepseekV3ForCausalLM", "deepseek_v3"


def read(fields: ConfigFields) -> ModelSpec:
    fields.allow("topk_method", None, "noaux_tc")
    fields.allow("scoring_func", None, "sigmoid")
    config = latent_config(fields, norm_topk_prob=None)
    gate = grouped_gate(fields, sigmoid_gate(fields, 2.5), config.num_experts, config.num_experts_per_tok, 8)
    dense = first_dense(fields, 3)
    interleaved = fields.boolean("rope_interleave", True)
    extras = latent_extras(fields, config, gate, dense, interleaved=interleaved)
    return decoder(MODEL_TYPE, config, NAMES, extras=extras)


def sigmoid_gate(fields: ConfigFields, default_factor: float) -> Gate:
    return Gate(
        scores=Scores.SIGMOID,
        correction=True,
        added_to_sum=1e-20,
        factor=fields.number("routed_scaling_factor", default_factor),
    )
