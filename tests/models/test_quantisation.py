"""What a configuration says of quantised weights is honoured or refused in a line; so are --quantization and --dtype."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from elastic_ep.config import ConfigError, ServeConfig
from elastic_ep.models.formats import PLAIN, Format, Fp8, Int4
from elastic_ep.models.registry import load_spec
from elastic_ep.plan import ServePlan, make_plan
from elastic_ep.precision import Precision, precision
from elastic_ep.weights.bank import load_weights
from tests.kit.quantised import SCHEMES, rewrite_config, write_pair
from tests.models.folders import CONFIG, write_checkpoint, write_json, write_texts

FP8: dict[str, Any] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
BLOCKS = Fp8(128, 128, "weight_scale_inv")
PREFIX = "model.layers.0."


def formats(folder: Path, asked: dict[str, Any]) -> dict[str, Format]:
    """By names of modules."""
    write_texts(folder, CONFIG | {"quantization_config": asked})
    return {piece.tensor.removesuffix(".weight"): piece.format for piece in load_spec(folder).pieces()}


def chosen(folder: Path, asked: dict[str, Any]) -> set[str]:
    return {module for module, made in formats(folder, asked).items() if made != PLAIN}


EXPERTS = {f"{PREFIX}mlp.experts.{e}.{name}_proj" for e in range(4) for name in ("gate", "up", "down")}
ATTENTION = {f"{PREFIX}self_attn.{name}_proj" for name in "qkvo"}


def test_what_float_8_is_by_default(tmp_path: Path) -> None:
    """Every projection, nothing that is a gate, an embedding, a norm or the head: DeepSeek's checkpoints list none."""
    assert chosen(tmp_path, FP8) == EXPERTS | ATTENTION
    assert set(formats(tmp_path, FP8).values()) == {PLAIN, BLOCKS}
    assert Fp8(0, 0, "weight_scale") in formats(tmp_path, {"quant_method": "fp8"}).values()


LEFT_OUT: list[tuple[list[str], set[str]]] = [
    ([f"{PREFIX}self_attn.o_proj"], {f"{PREFIX}self_attn.o_proj"}),
    (["model.layers.0"], EXPERTS | ATTENTION),
    (["model.layers.0.self_attn.q"], set()),
    (["o_proj"], {f"{PREFIX}self_attn.o_proj"}),
    (["model.layers.*.self_attn"], ATTENTION),
    ([r"model\.layers\.\d+\.self_attn\.(q|k)_proj"], {f"{PREFIX}self_attn.{name}_proj" for name in "qk"}),
    (["model.layers.0.mlp.experts"], EXPERTS),
    (["lm_head", f"{PREFIX}mlp.gate", f"{PREFIX}input_layernorm"], set()),
]


@pytest.mark.parametrize("field", ["modules_to_not_convert", "ignored_layers"])
@pytest.mark.parametrize(("names", "left"), LEFT_OUT, ids=[" ".join(names) for names, _ in LEFT_OUT])
def test_modules_that_are_not_converted(tmp_path: Path, field: str, names: list[str], left: set[str]) -> None:
    assert chosen(tmp_path, FP8 | {field: names}) == (EXPERTS | ATTENTION) - left


def compressed(weights: dict[str, Any], packing: str = "pack-quantized", **more: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "weights": weights, **more.pop("group", {})}
    return {
        "quant_method": "compressed-tensors",
        "format": packing,
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
        **more,
    }


def alone(rows: int, columns: int) -> Fp8:
    """Where activations are not quantised."""
    return Fp8(rows, columns, "weight_scale", weights_alone=True)


INT4 = {
    "type": "int",
    "num_bits": 4,
    "symmetric": True,
    "strategy": "group",
    "group_size": 8,
    "actorder": "weight",
}
FLOAT8 = {"type": "float", "num_bits": 8, "symmetric": True, "strategy": "tensor", "dynamic": False}


def test_what_compressed_tensors_are(tmp_path: Path) -> None:
    assert chosen(tmp_path, compressed(INT4)) == EXPERTS | ATTENTION
    assert chosen(tmp_path, compressed(INT4, ignore=[])) == EXPERTS | ATTENTION | {"lm_head"}
    assert chosen(tmp_path, compressed(INT4, ignore=["re:.*self_attn.*", "lm_head"])) == EXPERTS
    assert chosen(tmp_path, compressed(INT4, ignore=["o_proj", "lm_head"])) == EXPERTS | ATTENTION
    experts_alone = compressed(INT4, group={"targets": ["re:.*experts.*"]})
    assert chosen(tmp_path, experts_alone) == EXPERTS
    for weights, packing, made in (
        (INT4, "pack-quantized", Int4(8, zero_points=False)),
        ({**INT4, "symmetric": False, "strategy": "channel"}, "pack-quantized", Int4(0, zero_points=True)),
        (FLOAT8, "float-quantized", alone(0, 0)),
        ({**FLOAT8, "strategy": "channel"}, "naive-quantized", alone(1, 0)),
        ({**FLOAT8, "strategy": "group", "group_size": 16}, "float-quantized", alone(1, 16)),
        ({**FLOAT8, "strategy": "block", "block_structure": [8, 4]}, "float-quantized", alone(8, 4)),
    ):
        assert made in formats(tmp_path, compressed(weights, packing)).values()
    both = compressed(FLOAT8, "float-quantized", group={"input_activations": {**FLOAT8, "dynamic": True}})
    assert Fp8(0, 0, "weight_scale") in formats(tmp_path, both).values()
    mixed = compressed(FLOAT8, "mixed-precision")
    mixed["config_groups"] = {
        "a": {"targets": ["re:.*self_attn.*"], "weights": FLOAT8, "format": "float-quantized"},
        "b": {"targets": ["re:.*experts.*"], "weights": INT4, "format": "pack-quantized"},
    }
    found = formats(tmp_path, mixed)
    assert {found[name] for name in ATTENTION} == {alone(0, 0)}
    assert {found[name] for name in EXPERTS} == {Int4(8, zero_points=False)}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"quant_method": "awq", "bits": 4}, "supported are fp8, mxfp4, compressed-tensors"),
    ({"quant_method": ["fp8"]}, "supported are"),
    (FP8 | {"weight_block_size": [128, 0]}, "weight_block_size"),
    (FP8 | {"weight_block_size": [True, 128]}, "weight_block_size"),
    (FP8 | {"fmt": "e5m2"}, "fmt"),
    (FP8 | {"activation_scheme": "none"}, "activation_scheme"),
    (FP8 | {"expert_dtype": "fp4"}, "expert_dtype"),
    (FP8 | {"modules_to_convert": ["lm_head"]}, "modules_to_convert"),
    (FP8 | {"modules_to_not_convert": "lm_head"}, "modules_to_not_convert"),
    (FP8 | {"modules_to_not_convert": [7]}, "modules_to_not_convert"),
    (FP8 | {"modules_to_not_convert": ["("]}, "no regular expression"),
    (FP8 | {"modules_to_not_convert": ["(a+)+$"]}, "repeats too much"),
    (FP8 | {"modules_to_not_convert": [".*.*.*.*.*x"]}, "repeats too much"),
    (FP8 | {"modules_to_not_convert": ["x" * 600]}, "too long"),
    (FP8 | {"modules_to_not_convert": [f"{PREFIX}mlp.experts.2.down_proj"]}, "only all or none"),
    (FP8 | {"modules_to_not_convert": [r"model.layers.0.mlp.experts.\d.up_proj"]}, "only all or none"),
    (compressed({**INT4, "num_bits": 8}), "8 bits"),
    (compressed({**INT4, "strategy": "tensor"}), "strategy"),
    (compressed({**INT4, "group_size": 0}), "group_size"),
    (compressed({**INT4, "actorder": "group"}), "actorder"),
    (compressed({**INT4, "dynamic": True}), "dynamic"),
    (compressed({**INT4, "symmetric": "yes"}), "symmetric"),
    (compressed(FLOAT8, "nvfp4-pack-quantized"), "nvfp4"),
    (compressed({**FLOAT8, "symmetric": False}, "float-quantized"), "symmetric"),
    (compressed({**FLOAT8, "strategy": "block"}, "float-quantized"), "block_structure"),
    (compressed({**FLOAT8, "strategy": "token"}, "float-quantized"), "strategy"),
    (compressed(INT4, kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
    (compressed(INT4, sparsity_config={"format": "sparse-24-bitmask"}), "sparsity_config"),
    (compressed(INT4, quantization_status="frozen"), "quantization_status"),
    (compressed(INT4, config_groups={}), "config_groups"),
    (compressed(INT4, config_groups={"a": 7}), "config_groups"),
    (compressed(INT4, config_groups={"a": {"targets": ["Linear"]}}), "weights"),
    (compressed(INT4, ignore=["re:("]), "no regular expression"),
    ({"quant_method": "mxfp4", "modules_to_not_convert": [1]}, "modules_to_not_convert"),
]


def plan_of(folder: Path, **flags: Any) -> ServePlan:
    return make_plan(ServeConfig(ranks=1, model=str(folder), device="cpu", **flags))


def refused(folder: Path, **flags: Any) -> str:
    with pytest.raises(ConfigError) as raised:
        plan_of(folder, **flags)
    said = str(raised.value)
    assert said.isprintable()
    assert len(said) < 700
    return said


@pytest.mark.parametrize(("asked", "named"), REFUSED, ids=lambda value: str(value)[:60])
def test_what_is_not_done_is_said_before_anything_starts(
    tmp_path: Path, asked: dict[str, Any], named: str
) -> None:
    write_texts(tmp_path, CONFIG | {"quantization_config": asked})
    for load_format in ("auto", "dummy"):
        said = refused(tmp_path, load_format=load_format)
        assert "quantization_config" in said
        assert named in said


def test_rows_that_mxfp4_has_no_blocks_for(tmp_path: Path) -> None:
    write_texts(tmp_path, CONFIG | {"hidden_size": 48, "quantization_config": {"quant_method": "mxfp4"}})
    assert "has rows of 48" in refused(tmp_path, load_format="dummy")


VALUES = st.sampled_from(
    [None, True, 0, 1, 128, -1, 1.5, "", "fp8", "x", "re:x", [], [1], ["x"], {}, {"a": 1}, 2**70]
)
BASES = [FP8, {"quant_method": "mxfp4"}, compressed(INT4), compressed(FLOAT8, "float-quantized")]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_value_of_any_field_is_honoured_or_refused(
    tmp_path_factory: pytest.TempPathFactory, data: Any
) -> None:
    asked = dict(data.draw(st.sampled_from(BASES)))
    fields = [
        *asked,
        "modules_to_not_convert",
        "ignored_layers",
        "fmt",
        "ignore",
        "config_groups",
        "weights",
        "targets",
    ]
    field, value = data.draw(st.sampled_from(fields)), data.draw(VALUES)
    folder = tmp_path_factory.mktemp("model")
    if "config_groups" in asked and field in ("weights", "targets"):
        groups = asked["config_groups"]["group_0"]
        asked["config_groups"] = {"group_0": groups | {field: value}}
    else:
        asked[field] = value
    write_texts(folder, CONFIG | {"quantization_config": asked})
    said = str(folder)
    try:
        plan_of(folder, load_format="dummy")
    except ConfigError as error:
        said = str(error)
    assert said.isprintable()
    assert said.count(str(folder)) == 1


@pytest.fixture(params=["fp8", "float 8, a scale a row", "int 4 with zero points", "mxfp4"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    config = CONFIG | {"moe_intermediate_size": 32, "num_experts": 2}
    write_pair(tmp_path / "coded", tmp_path / "plain", SCHEMES[request.param], config)
    return tmp_path / "coded"


def changed(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> str:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    return refused(folder)


def test_a_checkpoint_that_is_not_as_its_configuration_says(folder: Path) -> None:
    """A tensor of scales that is missing, too short, or of integers; codes that are numbers; more than is known."""
    whole = load_file(folder / "model.safetensors")
    scales = next(name for name in whole if re.search(r"experts.*_scale", name))
    codes = next(
        name
        for name in whole
        if "expert" in name and whole[name].dtype not in (torch.float32, torch.bfloat16, torch.int64)
    )
    module = scales.rpartition(".")[0]
    plan_of(folder)
    assert scales in changed(folder, lambda tensors: tensors.__delitem__(scales))
    assert scales in changed(folder, lambda t: t.update(whole | {scales: torch.cat([whole[scales]] * 2)}))
    assert scales in changed(folder, lambda t: t.update(whole | {scales: whole[scales].to(torch.int16)}))
    assert codes in changed(folder, lambda t: t.update(whole | {codes: whole[codes].float()}))
    for name, own in ((".g_idx", ".qweight"), (".weight_g_idx", ".weight_scale_2")):
        more = {module + name: torch.zeros(4), module + own: torch.zeros(4)}
        if "mxfp4" not in load_spec(folder).quantisation:
            assert module in changed(folder, lambda t, more=more: t.update(whole | more))  # type: ignore[misc]


def test_a_static_scale_of_activations_is_not_needed(folder: Path) -> None:
    """Where activations are rounded to codes, each group of a row has a scale of its own."""
    whole = load_file(folder / "model.safetensors")
    name = f"{PREFIX}self_attn.q_proj.input_scale"
    if name.replace("input_scale", "weight_scale") not in whole:
        return
    save_file(whole | {name: torch.ones(1)}, folder / "model.safetensors")
    plan_of(folder)


def test_scales_may_have_a_dimension_more_or_less(tmp_path: Path) -> None:
    """One of the whole matrix is a number or a vector of one; one a row a vector or a column."""
    for index, name in enumerate(("float 8, a scale a matrix", "float 8, a scale a row")):
        coded = tmp_path / str(index)
        write_pair(coded, tmp_path / f"{index} plain", SCHEMES[name])
        spec, placement = plan_of(coded).model, plan_of(coded).placement
        before = load_weights(coded, spec, placement, 0).checksum(0, 0)
        file = coded / "model.safetensors"
        flat = {key: one.squeeze() if "_scale" in key else one for key, one in load_file(file).items()}
        save_file(flat, file)
        assert load_weights(coded, spec, placement, 0).checksum(0, 0) == before


def test_layers_that_are_left_alone_may_be_quantised_too(tmp_path: Path) -> None:
    """As those that guess tokens ahead, behind the model's own."""
    write_pair(tmp_path, tmp_path / "plain", SCHEMES["fp8"])
    file = tmp_path / "model.safetensors"
    more = {
        name.replace("layers.0", "layers.1"): one.clone()
        for name, one in load_file(file).items()
        if "layers.0" in name
    }
    more["model.layers.1.self_attn.q_proj.bias"] = torch.zeros(4)
    save_file(load_file(file) | more, file)
    plan_of(tmp_path)


def test_the_flag_must_say_what_the_checkpoint_is(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "plain")
    write_pair(tmp_path / "coded", tmp_path / "twin", SCHEMES["fp8"])
    assert plan_of(tmp_path / "coded", quantization="fp8").model == plan_of(tmp_path / "coded").model
    plan_of(tmp_path / "plain", quantization="none")
    assert "is quantised by fp8" in refused(tmp_path / "coded", quantization="mxfp4")
    assert "is quantised by fp8" in refused(tmp_path / "coded", quantization="none")
    assert "is not quantised" in refused(tmp_path / "plain", quantization="fp8")


def of(model: str, dtypes: set[str], device: str = "cpu", *, fused: bool = True, **flags: Any) -> Precision:
    return precision(ServeConfig(model=model, **flags), load_spec(Path(model)), dtypes, device, fused=fused)


def test_what_weights_are_in_memory(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    model, halves = str(tmp_path), {"BF16"}
    assert of(model, halves) == Precision(halves=True)
    assert of(model, halves, fused=False) == Precision()
    assert of(model, halves, dtype="float32") == of(model, halves, dtype="float") == Precision()
    assert of(model, {"F32"}, dtype="bfloat16") == Precision("bfloat16", halves=True)
    assert of(model, {"F32", "BF16"}) == Precision()
    assert of(model, halves, dtype="half") == Precision("float16")
    assert of(model, {"F16"}, dtype="float16") == of(model, {"F16"}) == Precision()
    assert of(model, halves, "cuda") == of(model, halves, "cuda", dtype="bfloat16") == Precision()
    assert "float16" in of(model, {"F16"}, "cuda").notices[0]
    for dtype in ("float16", "half", "float32", "float"):
        with pytest.raises(ConfigError, match="--dtype"):
            of(model, halves, "cuda", dtype=dtype)


def test_what_quantised_experts_are_on_a_gpu(tmp_path: Path) -> None:
    write_texts(tmp_path, CONFIG | {"quantization_config": FP8})
    model = str(tmp_path)
    for computed in (
        FP8,
        {"quant_method": "fp8"},
        compressed({**FLOAT8, "strategy": "channel"}, "float-quantized"),
        {"quant_method": "mxfp4"},
        compressed({**INT4, "group_size": 128}),
        compressed({**INT4, "symmetric": False, "strategy": "channel"}),
    ):
        config = CONFIG | {"moe_intermediate_size": 32, "quantization_config": computed}
        write_json(tmp_path / "config.json", config)
        assert of(model, {"F8_E4M3", "F32"}, "cuda") == Precision()
    for asked in (compressed(INT4), FP8 | {"weight_block_size": [128, 96]}):
        config = CONFIG | {"moe_intermediate_size": 32, "quantization_config": asked}
        write_json(tmp_path / "config.json", config)
        with pytest.raises(ConfigError, match=r"give --dtype bfloat16, .* by \d+\.\d GiB"):
            of(model, {"BF16"}, "cuda")
        assert of(model, {"BF16"}, "cuda", dtype="bfloat16") == Precision(widened=True)


def test_rows_become_codes_where_scales_span_a_group_of_them_and_the_checkpoint_quantises_activations() -> (
    None
):
    assert all(Fp8(rows, columns, "s").rows_too for rows, columns in ((128, 128), (0, 0), (1, 0), (64, 256)))
    assert not any(Fp8(128, columns, "s").rows_too for columns in (64, 96, 192))
    assert not Fp8(128, 128, "s", weights_alone=True).rows_too


def test_float16_weights_are_read_as_they_are_and_rounded_as_asked(tmp_path: Path) -> None:
    write_pair(tmp_path / "coded", tmp_path / "plain", SCHEMES["fp8"], dtype="float16")
    plan = plan_of(tmp_path / "plain", dtype="bfloat16")
    config = plan.rank_config(tmp_path)
    assert config.rounding == "bfloat16"
    exact = load_weights(tmp_path / "plain", plan.model, plan.placement, 0)
    rounded = load_weights(tmp_path / "plain", plan.model, plan.placement, 0, rounding=config.rounding)
    assert torch.equal(rounded.embed, exact.embed.bfloat16().float())
    assert not torch.equal(rounded.embed, exact.embed)


def test_a_configuration_may_be_changed(tmp_path: Path) -> None:
    write_pair(tmp_path / "coded", tmp_path / "plain", SCHEMES["fp8"])
    rewrite_config(tmp_path / "coded", weight_block_size=[128, 128])
    assert "weight_scale_inv has shape" in refused(tmp_path / "coded")
