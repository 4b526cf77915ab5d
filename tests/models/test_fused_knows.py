"""The engine in C++ is used for models that it knows wholly, and for no others."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from elastic_ep import plan
from elastic_ep.config import ServeConfig
from elastic_ep.models import fused
from elastic_ep.models.fused import unknown_to_fused
from elastic_ep.models.spec import Attention, ModelSpec
from elastic_ep.plan import make_plan
from elastic_ep.run import BUNDLED_MODEL
from tests.engine.test_invariance import SPECS


@pytest.mark.parametrize("name", sorted(SPECS))
def test_what_is_compared_with_plain_torch_is_known(name: str) -> None:
    assert unknown_to_fused(SPECS[name]) == ""


@dataclass(frozen=True, slots=True)
class Windowed(Attention):
    window: int | None = None


def with_attention(spec: ModelSpec, attention: Attention, index: int = 0) -> ModelSpec:
    layers = list(spec.layers)
    layers[index] = replace(layers[index], attention=attention)
    return replace(spec, layers=tuple(layers))


def test_another_kind_of_attention_is_unknown() -> None:
    kind = SPECS["tiny"].attention
    windowed = Windowed(kind.heads, kind.kv_heads, kind.head_dim, kind.rope_theta, kind.qk_norm)
    assert unknown_to_fused(with_attention(SPECS["tiny"], windowed, index=1)) == "Windowed"


def test_a_field_that_it_has_not_heard_of_is_unknown_unless_it_has_its_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(fused._KNOWN, Attention, fused._KNOWN[Attention] - {"clip_qkv"})
    assert unknown_to_fused(SPECS["tiny"]) == ""
    assert unknown_to_fused(SPECS["olmoe"]) == "clip_qkv"


def test_layers_of_several_kinds_and_other_parameters_are_unknown() -> None:
    spec = SPECS["tiny"]
    assert unknown_to_fused(with_attention(spec, replace(spec.attention, rope_theta=7.0), index=1))
    first = spec.layers[0]
    more = replace(first, dense=(*first.dense, replace(first.dense[0], name="sinks")))
    assert unknown_to_fused(replace(spec, layers=(more, *spec.layers[1:])))
    assert unknown_to_fused(replace(spec, dense=spec.dense[:2]))


def test_a_model_that_it_does_not_know_is_computed_in_torch_and_a_line_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plan, "unknown_to_fused", lambda spec: "window")
    made = make_plan(ServeConfig(model=str(BUNDLED_MODEL), device="cpu"))
    assert (made.fused, made.halves) == ("", False)
    assert sum("plain torch" in notice and "window" in notice for notice in made.notices) == 1
