"""The engine in C++ and the kernels are used for models that they know wholly, and for no others."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest

from elastic_ep import plan
from elastic_ep.config import ConfigError, ServeConfig
from elastic_ep.models.known import CUDA, FUSED, Known, unknown
from elastic_ep.models.spec import Attention, ModelSpec
from elastic_ep.plan import make_plan
from elastic_ep.run import BUNDLED_MODEL
from tests.engine.test_invariance import SPECS
from tests.models.small import OWN, small_spec


@pytest.mark.parametrize("name", sorted(SPECS))
def test_what_is_compared_with_plain_torch_is_known(name: str) -> None:
    assert unknown(SPECS[name], FUSED) == ""
    assert unknown(SPECS[name], CUDA) == ""


@pytest.mark.parametrize("family", sorted(OWN))
def test_the_kernels_know_every_family(family: str) -> None:
    assert unknown(small_spec(family), CUDA) == ""


def test_a_window_and_layers_that_attend_differently_are_no_affair_of_the_engine_in_c() -> None:
    assert unknown(small_spec("mixtral", sliding_window=9), FUSED) == "Attention.window"
    spec = small_spec("mixtral")
    assert unknown(with_attention(spec, replace(spec.grouped, rope_theta=7.0), index=1), FUSED)


@dataclass(frozen=True, slots=True)
class Windowed(Attention):
    another: int | None = None


def with_attention(spec: ModelSpec, attention: Attention, index: int = 0) -> ModelSpec:
    layers = list(spec.layers)
    layers[index] = replace(layers[index], attention=attention)
    return replace(spec, layers=tuple(layers))


def test_another_kind_of_attention_is_unknown() -> None:
    kind = SPECS["tiny"].grouped
    windowed = Windowed(kind.heads, kind.kv_heads, kind.head_dim, kind.rope_theta, kind.qk_norm)
    assert unknown(with_attention(SPECS["tiny"], windowed, index=1), FUSED) == "Windowed"


def test_a_field_that_it_has_not_heard_of_is_unknown_unless_it_has_its_default() -> None:
    less = Known({**FUSED.fields, Attention: FUSED.fields[Attention] - {"clip_qkv"}})
    assert unknown(SPECS["tiny"], less) == ""
    assert unknown(SPECS["olmoe"], less) == "Attention.clip_qkv"


def test_layers_of_several_kinds_and_other_parameters_are_unknown() -> None:
    spec = SPECS["tiny"]
    assert unknown(with_attention(spec, replace(spec.grouped, rope_theta=7.0), index=1), FUSED)
    first = spec.layers[0]
    more = replace(first, dense=(*first.dense, replace(first.dense[0], name="sinks")))
    assert unknown(replace(spec, layers=(more, *spec.layers[1:])), FUSED)


def test_latents_that_kernels_cannot_load_are_named() -> None:
    odd = small_spec("deepseek_v3", kv_lora_rank=10)
    assert unknown(odd, CUDA) == "latents of 10 and 8 numbers, no multiples of 8"
    assert unknown(small_spec("deepseek_v3"), CUDA) == ""


def test_a_model_that_it_does_not_know_is_computed_in_torch_and_a_line_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(plan, "unknown", lambda spec, known: "window")
    made = make_plan(ServeConfig(model=str(BUNDLED_MODEL), device="cpu"))
    assert (made.fused, made.precision.halves) == ("", False)
    assert sum("plain torch" in notice and "window" in notice for notice in made.notices) == 1


def test_a_model_that_the_kernels_do_not_know_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "unknown", lambda spec, known: "window" if known is CUDA else "")
    monkeypatch.setattr(plan, "choose_device", lambda device, *_: device)
    with pytest.raises(ConfigError, match=r"--device cuda: .* window.* --device cpu"):
        make_plan(ServeConfig(model=str(BUNDLED_MODEL), device="cuda"))
