"""Which models the engine in C++ and the kernels for GPUs compute: those whose spec says nothing they have not heard of.

Plain torch (engine/ops_cpu) computes all that a spec can say.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, Field, dataclass, fields
from typing import Any

from elastic_ep.models.spec import (
    Attention,
    Dense,
    Gate,
    LatentAttention,
    Layer,
    ModelSpec,
    Moe,
    Parameter,
    Shared,
)

_PLAIN: dict[type, frozenset[str]] = {
    ModelSpec: frozenset(
        {"family", "vocab_size", "hidden_size", "max_position_embeddings", "rms_norm_eps"}
        | {"eos_token_ids", "dense", "layers", "quantisation"}
    ),
    Layer: frozenset({"attention", "ffn", "dense"}),
    Attention: frozenset({"heads", "kv_heads", "head_dim", "rope_theta", "qk_norm", "clip_qkv"}),
    Moe: frozenset({"experts", "top_k", "inner", "renormalise", "parts"}),
}
_LAYER = frozenset({"input_norm", "qkv", "qk_norm", "out", "post_norm", "gate"})


_FFN = frozenset({"gate_up", "gate_up_bias", "down", "down_bias"})


@dataclass(frozen=True, slots=True)
class Known:
    """Fields by the kind of spec that has them, and names of parameters."""

    fields: Mapping[type, frozenset[str]]
    outside: frozenset[str] = frozenset({"embed", "final_norm", "lm_head"})
    layer: frozenset[str] = _LAYER
    expert: frozenset[str] = frozenset({"gate_up", "down"})
    several_kinds: bool = False
    """Layers may differ in their attention and FFN."""
    latent_grain: int = 1
    """Numbers: of latents and of the rotated ends of keys only multiples of it."""


FUSED = Known(_PLAIN)
"""fused/engine.cpp"""
CUDA = Known(
    {
        ModelSpec: _PLAIN[ModelSpec] | {"embed_factor", "branch_factor", "logits_divisor", "norm"},
        Layer: _PLAIN[Layer],
        Attention: _PLAIN[Attention]
        | {"rotary_dim", "interleaved", "scaling", "scale", "window", "temperature", "sinks"},
        LatentAttention: frozenset({"heads", "q_rank", "kv_rank", "nope", "rope", "value", "rotary"})
        | {"score_scale", "norm_eps"},
        Moe: _PLAIN[Moe] | {"gate", "shared", "activation"},
        Dense: frozenset({"inner"}),
        Gate: frozenset(field.name for field in fields(Gate)),
        Shared: frozenset(field.name for field in fields(Shared)),
    },
    outside=frozenset({"embed", "final_norm", "final_norm_bias", "lm_head", "lm_head_bias"}),
    layer=_LAYER
    | {f"{prefix}{name}" for prefix in ("", "shared_") for name in _FFN}
    | {"qkv_bias", "out_bias", "gate_bias", "gate_correction", "shared_gate", "sinks"}
    | {"input_norm_bias", "post_norm_bias"}
    | {"latents", "latents_bias", "q_norm", "q_b", "kv_norm", "kv_b"},
    expert=_FFN,
    several_kinds=True,
    latent_grain=8,
)
"""engine/ops_cuda. HAZARD: latents that are not aligned to 16 bytes are an illegal access on an H200 (Triton 3.6)."""


def unknown(spec: ModelSpec, known: Known) -> str:
    """What of the model is not known, "" if nothing.

    HAZARD: it would be left out in silence. So whatever is added to a spec is unknown, unless it has its default, until
    it is listed above.
    """
    for part in (spec, *(one for layer in spec.layers for one in (layer, layer.attention, layer.ffn))):
        if said := _unknown_field(part, known):
            return said
    if said := _unknown_name(spec.dense, known.outside):
        return said
    for layer in spec.layers:
        parts = layer.ffn.parts if isinstance(layer.ffn, Moe) else ()
        if said := _unknown_name(layer.dense, known.layer) or _unknown_name(parts, known.expert):
            return said
    for layer in spec.layers:
        kind = layer.attention
        if isinstance(kind, LatentAttention) and (
            kind.kv_rank % known.latent_grain or kind.rope % known.latent_grain
        ):
            return f"latents of {kind.kv_rank} and {kind.rope} numbers, no multiples of {known.latent_grain}"
    alike = known.several_kinds or len({(layer.attention, _sizes(layer)) for layer in spec.layers}) == 1
    return "" if alike else "layers of several kinds"


def _unknown_field(part: object, known: Known) -> str:
    if type(part) not in known.fields:
        return type(part).__name__
    for field in fields(part):  # type: ignore[arg-type]  # all of a spec are dataclasses
        if field.name not in known.fields[type(part)] and not _is_default(part, field):
            return f"{type(part).__name__}.{field.name}"
    return ""


def _unknown_name(parts: tuple[Parameter, ...], known: frozenset[str]) -> str:
    others = [part.name for part in parts if part.name not in known]
    return f"parameter {others[0]}" if others else ""


def _is_default(part: object, field: Field[Any]) -> bool:
    value = getattr(part, field.name)
    if field.default_factory is not MISSING:
        return bool(value == field.default_factory())
    return field.default is not MISSING and bool(value == field.default)


def _sizes(layer: Layer) -> tuple[int, int, int, bool] | None:
    ffn = layer.ffn
    return (ffn.experts, ffn.top_k, ffn.inner, ffn.renormalise) if isinstance(ffn, Moe) else None
