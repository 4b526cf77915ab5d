"""Llama 4, its text: chunks, layers without rotary embeddings, a sigmoid gate that weighs what goes into an expert."""

from __future__ import annotations

import math
from dataclasses import replace

from elastic_ep.models.config_json import ConfigFields, as_integer, shown
from elastic_ep.models.decoder import Extras, MoeNames, decoder
from elastic_ep.models.decoder_config import DecoderConfig, read_config
from elastic_ep.models.spec import (
    Gate,
    LongScaling,
    ModelSpec,
    Parameter,
    Piece,
    QkNorm,
    Scores,
    Shared,
    Stacked,
    Temperature,
    Window,
    YarnScaling,
    with_parameters,
)

ARCHITECTURE, MODEL_TYPE = "Llama4ForCausalLM", "llama4_text"
CONDITIONAL, CONDITIONAL_TYPE = "Llama4ForConditionalGeneration", "llama4"
NAMES = MoeNames(
    "feed_forward",
    "gate_proj",
    "up_proj",
    "down_proj",
    dense="feed_forward",
    gate="router",
    shared="shared_expert",
    fused_gate="feed_forward.router",
)


def read(fields: ConfigFields) -> ModelSpec:
    return _read(fields, one_by_one=fields.has("quantization_config"))


def read_conditional(fields: ConfigFields) -> ModelSpec:
    """Of a model that sees images too: its text alone. Raises `CheckpointError`."""
    text = fields.inside("text_config")
    text.allow("model_type", None, MODEL_TYPE)
    spec = _read(text, one_by_one=fields.has("quantization_config"))
    return with_parameters(spec, _below_language_model)


def _below_language_model(part: Parameter) -> Parameter:
    def below(name: str) -> str:
        return f"language_model.{name}"

    pieces = (
        replace(
            piece,
            tensor=below(piece.tensor),
            stacked=piece.stacked and replace(piece.stacked, tensor=below(piece.stacked.tensor)),
        )
        for piece in part.pieces
    )
    return replace(part, pieces=tuple(pieces))


def _read(fields: ConfigFields, *, one_by_one: bool) -> ModelSpec:
    """`one_by_one`: how experts lie where they are quantised."""
    fields.allow("hidden_act", None, "silu")
    fields.allow("num_experts_per_tok", None, 1)
    config = read_config(
        fields,
        inner="intermediate_size",
        norm_topk_prob=False,
        default_eps=1e-5,
        default_theta=500_000.0,
        default_top_k=1,
        default_head_dim=128,
    )
    layers, normed = config.num_hidden_layers, fields.boolean("use_qk_norm", True)
    if normed and isinstance(config.scaling, YarnScaling | LongScaling):
        raise fields.error("use_qk_norm", "with yarn or longrope is not supported")
    unrotated, biased = _unrotated(fields, layers), fields.boolean("attention_bias", False)
    dense = frozenset(range(layers)) - _mixing(fields, layers)
    extras = Extras(
        interleaved=True,
        windows=_windows(fields, layers, unrotated),
        unrotated=unrotated,
        temperature=_temperature(fields),
        qkv_bias=biased,
        out_bias=biased,
        gate=Gate(Scores.SIGMOID_OF_CHOSEN, into=True),
        shared=Shared(config.moe_intermediate_size),
        dense_layers=dense,
        dense_inner=fields.positive("intermediate_size_mlp", 16384) if dense else 0,
        experts=None if one_by_one else _experts,
    )
    norm = QkNorm.UNWEIGHTED if normed else QkNorm.NONE
    return decoder(MODEL_TYPE, config, NAMES, qk_norm=norm, extras=extras)


def _unrotated(fields: ConfigFields, layers: int) -> frozenset[int]:
    """`no_rope_layers` has a 1 for each layer that is rotated."""
    name = "no_rope_layers"
    listed = fields.get(name)
    if not listed:
        interval = fields.positive("no_rope_layer_interval", 4)
        return frozenset(range(interval - 1, layers, interval))
    if not isinstance(listed, list) or len(listed) < layers or any(one not in (0, 1) for one in listed):
        raise fields.error(name, f"must be a list of 0 or 1 for each layer, not {shown(listed)}")
    return frozenset(index for index in range(layers) if not listed[index])


def _windows(fields: ConfigFields, layers: int, unrotated: frozenset[int]) -> tuple[Window | None, ...]:
    kinds = fields.get("layer_types")
    if kinds is None:
        kinds = ["full_attention" if index in unrotated else "chunked_attention" for index in range(layers)]
    known = ("full_attention", "chunked_attention")
    if not isinstance(kinds, list) or len(kinds) != layers or any(one not in known for one in kinds):
        raise fields.error("layer_types", f"must be a list of {layers} of {known}, not {shown(kinds)}")
    if "chunked_attention" not in kinds:
        return ()
    window = Window(fields.positive("attention_chunk_size", 8192), chunked=True)
    return tuple(window if kind == "chunked_attention" else None for kind in kinds)


def _temperature(fields: ConfigFields) -> Temperature | None:
    name = "attn_temperature_tuning"
    asked = as_integer(fields.get(name))
    if asked is not None and type(asked) not in (bool, int):
        raise fields.error(name, f"must be true or false, not {shown(asked)}")
    if asked is not None and not asked:
        return None
    return Temperature(
        fields.number("floor_scale", 8192.0, 1.0, 1e9), fields.number("attn_scale", 0.1, 0.0, 1e3)
    )


def _mixing(fields: ConfigFields, layers: int) -> frozenset[int]:
    """The layers with experts."""
    listed = fields.get("moe_layers")
    if listed is None:
        step = fields.positive("interleave_moe_layer_step", 1)
        listed = list(range(step - 1, layers, step))
    if not isinstance(listed, list) or any(type(as_integer(one)) is not int for one in listed):
        raise fields.error("moe_layers", f"must be a list of layers, not {shown(listed)}")
    mixing = frozenset(range(layers)) & {as_integer(one) for one in listed}
    if not mixing:
        raise fields.error("moe_layers", "or interleave_moe_layer_step leaves no layer with experts")
    return mixing


def _experts(prefix: str, config: DecoderConfig) -> tuple[Parameter, ...]:
    """They lie stacked, [in, out] already."""
    hidden, inner, count = config.hidden_size, config.moe_intermediate_size, config.num_experts

    def part(name: str, shape: tuple[int, int]) -> Parameter:
        stacked = Stacked(f"{prefix}feed_forward.experts.{name}_proj", (count, *shape), 0, math.prod(shape))
        one = f"{prefix}feed_forward.experts.{{expert}}.{name}_proj"
        return Parameter(name, shape, (Piece(one, shape, stacked),), turned=False)

    return part("gate_up", (hidden, 2 * inner)), part("down", (inner, hidden))
