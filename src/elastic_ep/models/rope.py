"""Reads what a configuration says of rotary embeddings, in both dialects: at the top level, or in `rope_parameters`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from elastic_ep.models.config_json import ConfigFields, shown
from elastic_ep.models.spec import LinearScaling, Llama3Scaling, LongScaling, Scaling, YarnScaling

_KINDS = (None, "default", "linear", "llama3", "yarn", "longrope")


@dataclass(frozen=True, slots=True)
class Rope:
    theta: float
    dim: int
    """Of a head, that are rotated."""
    scaling: Scaling | None
    latent_factor: float = 1.0
    """DeepSeek's: of the scale of scores, twice."""


def read_rope(fields: ConfigFields, default_theta: float, head_dim: int, share: float | None = None) -> Rope:
    """`share` of a head is rotated if the configuration does not say; None: all of it always is.

    Raises `CheckpointError`.
    """
    inside = _inside(fields)
    for name in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings"):
        if fields.has(name) and inside.has(name) and fields.get(name) != inside.get(name):
            values = f"{shown(inside.get(name))}, and {shown(fields.get(name))} beside it"
            raise inside.error(name, f"is {values}: which of the two counts?")
    theta = (inside if inside.has("rope_theta") else fields).number("rope_theta", default_theta, 1.0, 1e15)
    dim = _rotated(fields, inside, head_dim, share)
    scaling = _scaling(fields, inside, theta, dim)
    factor = 1.0
    if scaling is not None and inside.has("mscale_all_dim"):
        stretch = inside.number("factor", 1.0, high=1e6)
        factor = _mscale(stretch, inside.number("mscale_all_dim", 0.0, low=0.0, high=1e3))
    return Rope(theta, dim, scaling, factor)


def _inside(fields: ConfigFields) -> ConfigFields:
    """The object with the details; an empty one if there is none."""
    known: dict[str, Any] = {}
    found = ConfigFields(fields.file, known)
    for name in ("rope_parameters", "rope_scaling"):
        plain = fields.get(name)
        if plain is None:
            continue
        if not isinstance(plain, dict):
            raise fields.error(name, "must be an object")
        if not plain:
            continue
        nested = [key for key, value in plain.items() if isinstance(value, dict)]
        if nested:
            raise fields.error(name, f"differs by layer ({shown(nested)}), which is not supported")
        kind = plain.get("type") if plain.get("rope_type") is None else plain["rope_type"]
        if not isinstance(kind, str | None) or kind not in _KINDS:
            raise fields.error(name, f"asks for {shown(kind)}; supported are {', '.join(_KINDS[1:])}")
        if plain.get("type") not in (None, kind):
            raise fields.error(name, f"asks for {shown(kind)}, and for {shown(plain['type'])}")
        said = {key: value for key, value in plain.items() if value is not None and key != "type"}
        if kind is not None:
            said["rope_type"] = kind
        if other := [key for key in said if known.get(key, said[key]) != said[key]]:
            raise fields.error(name, f"has another {other[0]} than rope_parameters: which of the two counts?")
        known |= said
        found = ConfigFields(fields.file, known, f"{name}.")
    return found


def _rotated(fields: ConfigFields, inside: ConfigFields, head_dim: int, share: float | None) -> int:
    if share is None:
        for one in (fields, inside):
            one.allow("partial_rotary_factor", None, 1)
        return head_dim
    where = inside if inside.has("partial_rotary_factor") else fields
    dim = int(head_dim * where.number("partial_rotary_factor", share, 1e-3, 1.0))
    if dim < 2 or dim % 2:
        raise where.error(
            "partial_rotary_factor", f"leaves {dim} of {head_dim} numbers: an even number, please"
        )
    return dim


def _scaling(fields: ConfigFields, inside: ConfigFields, theta: float, dim: int) -> Scaling | None:
    kind = inside.get("rope_type") or inside.get("type")
    if kind in (None, "default"):
        return None
    if kind == "linear":
        return LinearScaling(_factor(inside, None))
    positions = fields.positive("max_position_embeddings")
    where = fields if fields.has("original_max_position_embeddings") else inside
    original = where.positive("original_max_position_embeddings", positions)
    factor = _factor(inside, positions / original)
    match kind:
        case "llama3":
            low = inside.number("low_freq_factor", 1.0, 1e-3, 1e3)
            high = inside.number("high_freq_factor", 4.0, 1e-3, 1e3)
            if high < low:
                raise inside.error("high_freq_factor", "must not be less than low_freq_factor")
            return Llama3Scaling(factor, low, high, original)
        case "yarn":
            if theta <= 1:
                raise inside.error("rope_type", "is yarn, which needs a rope_theta of more than 1")
            fast = inside.number("beta_fast", 32.0, 1e-3, 1e6)
            slow = inside.number("beta_slow", 1.0, 1e-3, 1e6)
            truncate = inside.boolean("truncate", True)
            return YarnScaling(factor, fast, slow, original, truncate, _yarn_attention(inside, factor))
    if original < 2:
        raise where.error("original_max_position_embeddings", "must be 2 at least for longrope")
    attention = 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))
    attention = inside.number("attention_factor", attention, 1e-3, 1e3)
    return LongScaling(
        original,
        short=_divisors(inside, "short_factor", dim),
        long=_divisors(inside, "long_factor", dim),
        short_attention=inside.number("short_mscale", attention, 1e-3, 1e3),
        long_attention=inside.number("long_mscale", attention, 1e-3, 1e3),
    )


def _factor(inside: ConfigFields, default: float | None) -> float:
    if default is None and not inside.has("factor"):
        raise inside.error("factor", "is missing")
    return inside.number("factor", 1.0 if default is None else default, 1e-3, 1e6)


def _yarn_attention(inside: ConfigFields, factor: float) -> float:
    """Of cosines and sines. With one of the two mscales alone neither counts."""
    both = inside.number("mscale", 0.0, 0.0, 1e3), inside.number("mscale_all_dim", 0.0, 0.0, 1e3)
    usual = _mscale(factor, 1.0)
    if all(both):
        usual = _mscale(factor, both[0]) / _mscale(factor, both[1])
    return inside.number("attention_factor", usual, 1e-3, 1e3)


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 or mscale == 0 else 0.1 * mscale * math.log(factor) + 1.0


def _divisors(inside: ConfigFields, name: str, dim: int) -> tuple[float, ...]:
    given = inside.get(name)
    if not isinstance(given, list) or len(given) != dim // 2:
        raise inside.error(name, f"must be a list of {dim // 2} numbers")
    if any(type(one) not in (int, float) or not 1e-3 <= one <= 1e6 for one in given):
        raise inside.error(name, f"must hold numbers from 0.001 to 1e+06, not {shown(given)}")
    return tuple(float(one) for one in given)
