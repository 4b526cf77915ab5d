"""A folder that is not a whole checkpoint is refused in one line before anything is started."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from elastic_ep import serve
from elastic_ep.models.registry import load_spec
from elastic_ep.run import USAGE_ERROR, main
from elastic_ep.weights.bank import checkpoint_source
from elastic_ep.weights.checkpoint import validate_checkpoint
from tests.models.folders import (
    CONFIG,
    tensors,
    write_checkpoint,
    write_json,
    write_shard,
    write_sharded,
    write_texts,
)

EMBED, NORM = "model.embed_tokens.weight", "model.norm.weight"
Change = Callable[[dict[str, Any]], None]


@pytest.fixture
def refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Any:
    """Run the command on the folder; what it says in its one line. Nothing may be started."""

    def nothing(*_arguments: Any) -> int:
        raise AssertionError("started")

    monkeypatch.setattr(serve, "RunProcess", nothing)

    def run(folder: Path, **flags: str) -> str:
        given = [part for name, value in flags.items() for part in (f"--{name.replace('_', '-')}", value)]
        assert main(["--model", str(folder), "--ranks", "2", "--device", "cpu", *given]) == USAGE_ERROR
        out, err = capfd.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        assert "Traceback" not in err
        assert err.count(str(folder)) == 1, "the path, once"
        return err

    return run


def test_a_whole_checkpoint_is_accepted(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "single")
    write_sharded(tmp_path / "sharded")
    for folder in (tmp_path / "single", tmp_path / "sharded"):
        found = validate_checkpoint(folder, load_spec(folder))
        assert set(found) == set(tensors(folder))


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_each_dtype_is_read_as_what_it_is(tmp_path: Path, dtype: str) -> None:
    write_checkpoint(tmp_path, dtype)
    file = tmp_path / "model.safetensors"
    given = {name: torch.randn(tensor.shape).to(tensor.dtype) for name, tensor in load_file(file).items()}
    save_file(given, file)
    source = checkpoint_source(validate_checkpoint(tmp_path, load_spec(tmp_path)))
    for name, tensor in given.items():
        assert torch.equal(source(name).float(), tensor.float()), name


def clip_data(header: dict[str, Any]) -> int:
    return int(max(entry["data_offsets"][1] for entry in header.values())) - 1


HEADERS: dict[str, tuple[Change, str]] = {
    "a tensor is missing": (lambda header: header.update(other=header.pop(NORM)), NORM),
    "another shape": (lambda header: header[NORM].update(shape=[31]), NORM),
    "a transposed shape": (lambda header: header[EMBED].update(shape=[32, 640]), EMBED),
    "another dtype of as many bytes": (lambda header: header[NORM].update(dtype="I16"), "I16"),
    "an 8-bit float": (lambda header: header[NORM].update(dtype="F8_E4M3"), "F8_E4M3"),
    "a wider dtype than there are bytes": (lambda header: header[NORM].update(dtype="F32"), NORM),
    "no dtype": (lambda header: header[NORM].pop("dtype"), NORM),
    "a dtype that is no string": (lambda header: header[NORM].update(dtype=7), NORM),
    "a shape that is no array": (lambda header: header[NORM].update(shape=32), NORM),
    "a shape of fractions": (lambda header: header[NORM].update(shape=[32.0]), NORM),
    "a negative shape": (lambda header: header[NORM].update(shape=[-32]), NORM),
    "offsets of strings": (lambda header: header[NORM].update(data_offsets=["0", "64"]), NORM),
    "three offsets": (lambda header: header[NORM].update(data_offsets=[0, 1, 2]), NORM),
    "offsets the wrong way round": (lambda header: header[NORM]["data_offsets"].reverse(), NORM),
    "negative offsets": (lambda header: header[NORM].update(data_offsets=[-64, 0]), NORM),
    "an entry that is no object": (lambda header: header.update({NORM: 7}), NORM),
    "two tensors in the same bytes": (lambda header: header[NORM].update(data_offsets=[0, 64]), "overlaps"),
    "a name of many lines": (lambda header: header.update({"a\nb": 7}), "a b"),
}
"""What is changed in the header of a whole file, and what the line must name."""


@pytest.mark.parametrize(("change", "named"), HEADERS.values(), ids=HEADERS.keys())
def test_a_header_that_contradicts_itself_or_the_configuration(
    tmp_path: Path, refused: Callable[..., str], change: Change, named: str
) -> None:
    write_texts(tmp_path)
    header = tensors(tmp_path)
    end = clip_data(header) + 1
    change(header)
    write_shard(tmp_path / "model.safetensors", header, end=end)
    assert named in refused(tmp_path)


EXTRA = [
    "model.layers.0.mlp.experts.0.down_proj.qweight",
    "model.layers.0.mlp.experts.0.down_proj.qzeros",
    "model.layers.0.mlp.experts.0.down_proj.scales",
    "model.layers.0.mlp.experts.0.down_proj.weight_packed",
    "model.layers.0.mlp.experts.0.down_proj.weight_scale",
    "model.layers.0.mlp.experts.0.down_proj.weight_scale_inv",
    "model.layers.0.mlp.experts.0.down_proj.input_scale",
    "model.layers.0.mlp.experts.0.down_proj.weight.absmax",
    "model.layers.0.mlp.experts.down_proj_blocks",
    "model.layers.0.self_attn.q_proj.bias",
]


@pytest.mark.parametrize("name", EXTRA)
def test_tensors_that_would_be_left_out_and_matter(
    tmp_path: Path, refused: Callable[..., str], name: str
) -> None:
    write_texts(tmp_path)
    header = tensors(tmp_path)
    end = clip_data(header) + 1
    write_shard(
        tmp_path / "model.safetensors",
        {**header, name: {"dtype": "BF16", "shape": [4], "data_offsets": [end, end + 8]}},
    )
    assert name in refused(tmp_path)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("left", [0, 7, 8, 100, -1])
def test_a_file_that_is_cut_off(
    tmp_path: Path, refused: Callable[..., str], sharded: bool, left: int
) -> None:
    (write_sharded if sharded else write_checkpoint)(tmp_path)
    file = tmp_path / ("model-1.safetensors" if sharded else "model.safetensors")
    data = file.read_bytes()
    file.write_bytes(data[:left])
    said = refused(tmp_path)
    assert f"{file.name} is truncated" in said
    file.write_bytes(data + b"x")
    assert "belong to no tensor" in refused(tmp_path)


@pytest.mark.parametrize(
    "content",
    [b"", b"PK\x03\x04" * 100, b"\x02" + bytes(7) + b"[]", b"\x02" + bytes(7) + b"{]", b"\xff" * 64],
)
def test_a_file_of_another_format(tmp_path: Path, refused: Callable[..., str], content: bytes) -> None:
    write_texts(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    assert "model.safetensors" in refused(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "generation_config.json"])
def test_what_is_no_file_is_not_opened(tmp_path: Path, refused: Callable[..., str], name: str) -> None:
    """A pipe would be waited for."""
    write_checkpoint(tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / name)
    assert "is not a file" in refused(tmp_path)
    (tmp_path / name).unlink()
    (tmp_path / name).mkdir()
    assert "is not a file" in refused(tmp_path)


OUTSIDE = [
    "../other.safetensors",
    "/etc/hostname",
    "sub/model-0.safetensors",
    "..",
    "",
    ".",
    "./model-0.safetensors",
]


@pytest.mark.parametrize("shard", OUTSIDE)
def test_a_shard_outside_the_folder_is_not_read(
    tmp_path: Path, refused: Callable[..., str], shard: str
) -> None:
    folder = tmp_path / "model"
    weight_map = write_sharded(folder)
    # There, and whole: only the name is wrong.
    for place in (tmp_path / "other.safetensors", folder / "sub" / "model-0.safetensors"):
        place.parent.mkdir(exist_ok=True)
        place.write_bytes((folder / "model-0.safetensors").read_bytes())
    moved = {name: shard if found == "model-0.safetensors" else found for name, found in weight_map.items()}
    write_json(folder / "model.safetensors.index.json", {"weight_map": moved})
    assert "not a file of this folder" in refused(folder)


def test_an_index_that_lies(tmp_path: Path, refused: Callable[..., str]) -> None:
    weight_map = write_sharded(tmp_path)
    index = tmp_path / "model.safetensors.index.json"
    write_json(index, {"weight_map": {**weight_map, "model.absent.weight": "model-0.safetensors"}})
    assert "model.absent.weight" in refused(tmp_path)
    other = {"model-0.safetensors": "model-1.safetensors", "model-1.safetensors": "model-0.safetensors"}
    write_json(index, {"weight_map": {**weight_map, NORM: other[weight_map[NORM]]}})
    assert NORM in refused(tmp_path)
    write_json(index, {"weight_map": {name: at for name, at in weight_map.items() if name != NORM}})
    assert NORM in refused(tmp_path)
    write_json(index, {"weight_map": {**weight_map, NORM: "model-2.safetensors"}})
    assert "model-2.safetensors is missing" in refused(tmp_path)
    write_json(index, {"weight_map": {**weight_map, NORM: "x" * 300}})
    assert "cannot be read" in refused(tmp_path)
    wrongs: list[Any] = [{}, {"weight_map": []}, {"weight_map": {NORM: 7}}, []]
    for wrong in wrongs:
        write_json(index, wrong)
        refused(tmp_path)


def test_a_tensor_is_read_from_the_shard_that_the_index_names(tmp_path: Path) -> None:
    """Also when another shard has one of that name."""
    weight_map = write_sharded(tmp_path)
    write_shard(
        tmp_path / "model-2.safetensors", {NORM: {"dtype": "BF16", "shape": [32], "data_offsets": [0, 64]}}
    )
    write_json(
        tmp_path / "model.safetensors.index.json",
        {"weight_map": {**weight_map, NORM: "model-2.safetensors"}},
    )
    found = validate_checkpoint(tmp_path, load_spec(tmp_path))
    assert found[NORM].file.name == "model-2.safetensors"


def test_a_folder_without_weights(tmp_path: Path, refused: Callable[..., str]) -> None:
    write_texts(tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    assert "neither model.safetensors nor" in refused(tmp_path)
    refused(tmp_path / "absent")


QUANTISED: list[dict[str, Any]] = [
    {"quantization_config": {"quant_method": "fp8", "weight_block_size": [128]}},
    {"quantization_config": {"quant_method": "awq", "bits": 4}},
    {"quantization_config": {"quant_method": "gptq", "bits": 4}},
    {"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}},
    {"quantization_config": {"load_in_4bit": True}},
    {"compression_config": {"format": "float-quantized"}},
    {"quantization_config": "fp8"},
    {"torch_dtype": "float8_e4m3fn"},
    {"dtype": "int8"},
    {"dtype": {"": "float32"}},
]
OTHERS: list[dict[str, Any]] = [
    {"architectures": ["LlamaForCausalLM"]},
    {"architectures": "Qwen3MoeForCausalLM"},
    {"architectures": [7]},
    {"architectures": [], "model_type": "llama"},
    {"model_type": "mixtral"},
    {"layer_types": ["full_attention", "sliding_attention"]},
    {"partial_rotary_factor": 0.5},
    {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}},
    {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
    {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
    {"rope_parameters": {"rope_type": "yarn", "factor": -1.0}},
    {"rope_parameters": {"rope_type": "default", "rope_theta": 7.0}, "rope_theta": 8.0},
    {"rope_parameters": {"rope_type": "yarn", "type": "linear", "factor": 2.0}},
    {
        "rope_parameters": {"rope_type": "linear", "factor": 2.0},
        "rope_scaling": {"type": "linear", "factor": 4.0},
    },
    {
        "rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64},
        "original_max_position_embeddings": 128,
    },
    {"mlp_only_layers": [0]},
    {"decoder_sparse_step": 2},
]


@pytest.mark.parametrize("change", [*QUANTISED, *OTHERS], ids=json.dumps)
@pytest.mark.parametrize("load_format", ["auto", "dummy"])
def test_a_configuration_of_what_is_not_done_here(
    tmp_path: Path, refused: Callable[..., str], change: dict[str, Any], load_format: str
) -> None:
    write_checkpoint(tmp_path)
    write_json(tmp_path / "config.json", CONFIG | change)
    assert next(reversed(change)) in refused(tmp_path, load_format=load_format) or "architectures" in change


@pytest.mark.parametrize("name", ["quantize_config.json", "quant_config.json", "hf_quant_config.json"])
def test_a_file_that_says_quantised(tmp_path: Path, refused: Callable[..., str], name: str) -> None:
    write_checkpoint(tmp_path)
    write_json(tmp_path / name, {"bits": 4})
    assert name in refused(tmp_path)
