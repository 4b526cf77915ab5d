"""ERNIE-4.5-MoE: interleaved rotary embeddings, a softmax gate with a correction, shared experts, dense first layers."""

from __future__ import annotations

from elastic_ep.models.config_json import ConfigFields, as_integer, shown
from elastic_ep.models.decoder import Extras, MoeNames, decoder
from elastic_ep.models.decoder_config import dense_inner, full_attention, read_config
from elastic_ep.models.spec import Gate, ModelSpec, Shared

ARCHITECTURE, MODEL_TYPE = "Ernie4_5_MoeForCausalLM", "ernie4_5_moe"
NAMES = MoeNames(
    "mlp",
    "gate_proj",
    "up_proj",
    "down_proj",
    correction="moe_statics.e_score_correction_bias",
    fused_correction="mlp.gate.moe_statics.e_score_correction_bias",
)


def read(fields: ConfigFields) -> ModelSpec:
    fields.allow("hidden_act", None, "silu")
    full_attention(fields)
    config = read_config(
        fields,
        inner="moe_intermediate_size",
        experts=("moe_num_experts", "num_local_experts", "num_experts"),
        top_k="moe_k",
        default_top_k=6,
        norm_topk_prob=True,
        default_eps=1e-5,
        default_theta=500_000.0,
        tied_by_default=True,
    )
    dense = _dense_layers(fields, config.num_hidden_layers)
    biased = fields.boolean("use_bias", False)
    shared = _integer(fields, "moe_num_shared_experts", 2, 0, 1024)
    extras = Extras(
        interleaved=True,
        qkv_bias=biased,
        out_bias=biased,
        ffn_bias=biased,
        head_bias=biased,
        gate=Gate(correction=True, least_sum=fields.number("moe_norm_min", 1e-12)),
        shared=Shared(config.moe_intermediate_size * shared) if shared else None,
        dense_layers=dense,
        dense_inner=dense_inner(fields, dense),
        correction_shape=(1,),
    )
    return decoder(MODEL_TYPE, config, NAMES, extras=extras)


def _dense_layers(fields: ConfigFields, layers: int) -> frozenset[int]:
    first = _integer(fields, "moe_layer_start_index", 1, 0, layers)
    last = _integer(fields, "moe_layer_end_index", -1, -1, layers)
    last = layers - 1 if last == -1 else last
    interval = fields.positive("moe_layer_interval", 1)
    mixing = {index for index in range(layers) if first <= index <= last and (index + 1) % interval == 0}
    if not mixing:
        raise fields.error("moe_layer_start_index", "leaves no layer with experts")
    return frozenset(range(layers)) - mixing


def _integer(fields: ConfigFields, name: str, default: int, low: int, high: int) -> int:
    value = as_integer(fields.get(name) if fields.has(name) else default)
    if type(value) is not int or not low <= value <= high:
        raise fields.error(name, f"must be an integer from {low} to {high}, not {shown(fields.get(name))}")
    return value
