"""Which models the engine in C++ computes: those whose spec says nothing that it has not heard of."""

from __future__ import annotations

from dataclasses import MISSING, Field, fields
from typing import Any

from elastic_ep.models.spec import Attention, Layer, ModelSpec, Moe

_KNOWN: dict[type, frozenset[str]] = {
    ModelSpec: frozenset(
        {"family", "vocab_size", "hidden_size", "max_position_embeddings", "rms_norm_eps"}
        | {"eos_token_ids", "dense", "layers"}
    ),
    Layer: frozenset({"attention", "ffn", "dense"}),
    Attention: frozenset({"heads", "kv_heads", "head_dim", "rope_theta", "qk_norm", "clip_qkv"}),
    Moe: frozenset({"experts", "top_k", "inner", "renormalise", "parts"}),
}
_OUTSIDE = ("embed", "final_norm", "lm_head")
_DENSE = {"input_norm", "qkv", "out", "post_norm", "gate"}
_EXPERT = ("gate_up", "down")


def unknown_to_fused(spec: ModelSpec) -> str:
    """What of the model the C++ (fused/engine.cpp) does not know; "" if it knows all.

    HAZARD: it would compute what it does not know as if it were not there. So whatever is added to a spec is unknown,
    unless it has its default, until it is listed above.
    """
    first = spec.layers[0]
    for part in (spec, *(one for layer in spec.layers for one in (layer, layer.attention, layer.ffn))):
        if type(part) not in _KNOWN:
            return type(part).__name__
        for field in fields(part):
            if field.name not in _KNOWN[type(part)] and not _is_default(part, field):
                return field.name
    if tuple(part.name for part in spec.dense) != _OUTSIDE:
        return "parameters outside the layers"
    for layer in spec.layers:
        names = {part.name for part in layer.dense} - {"qk_norm"}
        if names != _DENSE or tuple(part.name for part in layer.ffn.parts) != _EXPERT:
            return "parameters of a layer"
        if layer.attention != first.attention or _sizes(layer.ffn) != _sizes(first.ffn):
            return "layers of several kinds"
    return ""


def _is_default(part: object, field: Field[Any]) -> bool:
    value = getattr(part, field.name)
    if field.default_factory is not MISSING:
        return bool(value == field.default_factory())
    return field.default is not MISSING and bool(value == field.default)


def _sizes(ffn: Moe) -> tuple[int, int, int, bool]:
    return ffn.experts, ffn.top_k, ffn.inner, ffn.renormalise
