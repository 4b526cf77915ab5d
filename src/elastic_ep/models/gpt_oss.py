"""gpt-oss: sinks, windows on every second layer, biases throughout, a clamped activation, experts that lie stacked."""

from __future__ import annotations

import math

from elastic_ep.models.config_json import ConfigFields, shown
from elastic_ep.models.decoder import Extras, MoeNames, decoder
from elastic_ep.models.decoder_config import DecoderConfig, read_config
from elastic_ep.models.spec import Clamped, Gate, ModelSpec, Parameter, Piece, Scores, Stacked, Window

ARCHITECTURE, MODEL_TYPE = "GptOssForCausalLM", "gpt_oss"
NAMES = MoeNames("mlp", "gate_proj", "up_proj", "down_proj", gate="router", fused_gate="mlp.router")
_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}
"""Where the configuration says nothing."""


def read(fields: ConfigFields) -> ModelSpec:
    fields.allow("hidden_act", None, "silu")
    if not fields.get("rope_parameters") and not fields.get("rope_scaling"):
        fields = fields.with_values(rope_parameters=_ROPE)
    config = read_config(
        fields,
        inner="intermediate_size",
        norm_topk_prob=False,
        default_eps=1e-5,
        default_theta=150_000.0,
        default_head_dim=64,
    )
    biased = fields.boolean("attention_bias", True)
    extras = Extras(
        windows=_windows(fields, config.num_hidden_layers),
        sinks=True,
        qkv_bias=biased,
        out_bias=biased,
        gate=Gate(scores=Scores.SOFTMAX_OF_CHOSEN, bias=True),
        activation=Clamped(
            fields.number("swiglu_alpha", 1.702, 1e-3, 1e3), fields.number("swiglu_limit", 7.0, 1e-3, 1e6)
        ),
        experts=_experts,
    )
    return decoder(MODEL_TYPE, config, NAMES, extras=extras)


def _windows(fields: ConfigFields, layers: int) -> tuple[Window | None, ...]:
    kinds = fields.get("layer_types")
    if kinds is None:
        kinds = ["full_attention" if index % 2 else "sliding_attention" for index in range(layers)]
    known = ("full_attention", "sliding_attention")
    if not isinstance(kinds, list) or len(kinds) != layers or any(one not in known for one in kinds):
        raise fields.error("layer_types", f"must be a list of {layers} of {known}, not {shown(kinds)}")
    window = Window(fields.positive("sliding_window", 128))
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


def _experts(prefix: str, config: DecoderConfig) -> tuple[Parameter, ...]:
    """They lie [in, out] already, gate and up alternating."""
    hidden, inner, count = config.hidden_size, config.moe_intermediate_size, config.num_experts
    sizes = {"gate_up": (hidden, 2 * inner), "down": (inner, hidden)}

    def part(name: str, tensor: str, shape: tuple[int, ...]) -> Parameter:
        stacked = Stacked(f"{prefix}mlp.experts.{tensor}", (count, *shape), 0, math.prod(shape))
        one = f"{prefix}mlp.experts.{{expert}}.{tensor}"
        piece = Piece(one, shape, stacked, alternating=name.startswith("gate_up"))
        return Parameter(name, shape, (piece,), turned=False)

    return tuple(
        made
        for name, shape in sizes.items()
        for made in (
            part(name, f"{name}_proj", shape),
            part(f"{name}_bias", f"{name}_proj_bias", shape[1:]),
        )
    )
