"""Checkpoints in each quantised format, beside twins that hold as plain numbers what the codes come to.

The numbers are found here with numpy, code by code, after the formats' own definitions: nothing of it is the product's.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file

from elastic_ep.models.registry import load_spec
from tests.models.folders import CONFIG, write_json, write_texts

Floats = NDArray[np.float32]
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Coded:
    """What stands in place of a module's weight, by the ends of the names; and the numbers that it is."""

    tensors: Tensors
    numbers: Floats


def e4m3(code: int) -> float:
    """Four bits of exponent with a bias of 7, three of mantissa, no infinity."""
    sign, exponent, mantissa = -1.0 if code & 128 else 1.0, code >> 3 & 15, code & 7
    if code & 127 == 127:
        return math.nan
    if exponent == 0:
        return float(sign * mantissa / 8 * 2**-6)
    return float(sign * (1 + mantissa / 8) * 2.0 ** (exponent - 7))


_E4M3 = np.array([e4m3(code) for code in range(256)], dtype=np.float32)
_ORDERED = np.argsort(_E4M3[:127])


def fp8(matrix: Floats, block: tuple[int, int], scales: str) -> Coded:
    """A scale for each block; 0 is all rows, or all columns."""
    rows, columns = (size or whole for size, whole in zip(block, matrix.shape, strict=True))
    grid = tuple(-(-whole // size) for whole, size in zip(matrix.shape, (rows, columns), strict=True))
    codes, numbers = np.zeros(matrix.shape, np.uint8), np.zeros(matrix.shape, np.float32)
    found = np.zeros(grid, np.float32)
    for i, j in np.ndindex(grid):
        where = np.s_[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns]
        scale = np.float32(max(np.abs(matrix[where]).max(), 1e-6) / 448)
        small = np.minimum(np.abs(matrix[where]) / scale, 448)
        nearest = np.abs(small[..., None] - _E4M3[:127]).argmin(-1).astype(np.uint8)
        codes[where] = nearest | (np.signbit(matrix[where]) * np.uint8(128))
        numbers[where] = _E4M3[codes[where]] * scale
        found[i, j] = scale
    held = torch.from_numpy(codes).view(torch.float8_e4m3fn)
    return Coded({".weight": held, f".{scales}": torch.from_numpy(found)}, numbers)


def int4(matrix: Floats, group: int, *, zero_points: bool) -> Coded:
    """A scale, and perhaps a zero point, for each group of a row; 0 is the row."""
    out, inner = matrix.shape
    size = group or inner
    groups = -(-inner // size)
    scales, zeros = np.zeros((out, groups), np.float32), np.full((out, groups), 8)
    codes, numbers = np.zeros(matrix.shape, int), np.zeros(matrix.shape, np.float32)
    for one in range(groups):
        where = np.s_[:, one * size : (one + 1) * size]
        low, high = matrix[where].min(1).clip(max=0), matrix[where].max(1).clip(min=0)
        wide = (high - low) / 15 if zero_points else np.maximum(high, -low) / 7
        scale = torch.from_numpy(wide.clip(min=1e-6)).bfloat16().float().numpy()
        if zero_points:
            zeros[:, one] = np.round(-low / scale).clip(0, 15)
        scales[:, one], zero = scale, zeros[:, one, None]
        codes[where] = (np.round(matrix[where] / scale[:, None]) + zero).clip(0, 15)
        numbers[where] = (codes[where] - zero).astype(np.float32) * scale[:, None]
    tensors = {
        ".weight_packed": torch.from_numpy(words(codes)),
        ".weight_scale": torch.from_numpy(scales).bfloat16(),
        ".weight_shape": torch.tensor([out, inner]),
    }
    if zero_points:
        tensors[".weight_zero_point"] = torch.from_numpy(words(zeros.T).T.copy())
    return Coded(tensors, numbers)


def words(codes: NDArray[Any]) -> NDArray[np.int32]:
    """Rows of numbers from 0 to 15, eight in an int32, the first in the lowest bits."""
    rows, columns = codes.shape
    packed = np.zeros((rows, -(-columns // 8)), np.uint32)
    for column in range(columns):
        packed[:, column // 8] |= codes[:, column].astype(np.uint32) << np.uint32(4 * (column % 8))
    return packed.view(np.int32)


_E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)


def mxfp4(matrix: Floats) -> Coded:
    """[out, in / 32, 16] bytes, and an exponent for each 32 numbers of a row."""
    out, inner = matrix.shape
    blocks, scales = np.zeros((out, inner // 32, 16), np.uint8), np.zeros((out, inner // 32), np.uint8)
    numbers = np.zeros(matrix.shape, np.float32)
    for row, block in np.ndindex(out, inner // 32):
        where = np.s_[row, 32 * block : 32 * block + 32]
        values = matrix[where]
        exponent = math.floor(math.log2(max(np.abs(values).max(), 1e-30))) - 2
        scales[row, block] = exponent + 127
        code = np.abs(np.abs(values)[:, None] / 2.0**exponent - _E2M1).argmin(-1)
        numbers[where] = np.copysign(_E2M1[code] * 2.0**exponent, values)
        code |= np.signbit(values) * 8
        blocks[row, block] = code[0::2] | code[1::2] << 4
    return Coded({"_blocks": torch.from_numpy(blocks), "_scales": torch.from_numpy(scales)}, numbers)


Coder = Callable[[Floats], Coded]


@dataclass(frozen=True)
class Scheme:
    """How a checkpoint is quantised: what its config.json says, and how each module's weight is coded."""

    config: Mapping[str, Any]
    coder: Coder
    only: Callable[[str], bool] = field(
        default=lambda module: "embed" not in module and "lm_head" not in module
    )
    """Which modules are quantised, of those that are matrices and no gates."""


def _group(weights: Mapping[str, Any]) -> dict[str, Any]:
    return {"targets": ["Linear"], "input_activations": None, "weights": {"dynamic": False, **weights}}


def _compressed(packing: str, weights: Mapping[str, Any], ignore: list[str]) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors",
        "format": packing,
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "ignore": ["lm_head", *ignore],
        "config_groups": {"group_0": _group(weights)},
    }


_FLOAT = {"type": "float", "num_bits": 8, "symmetric": True}
_INT = {"type": "int", "num_bits": 4, "strategy": "group", "group_size": 16}
_KEPT = "model.layers.0.self_attn.o_proj"
SCHEMES: dict[str, Scheme] = {
    "fp8": Scheme(
        {"quant_method": "fp8", "weight_block_size": [24, 20], "activation_scheme": "dynamic", "fmt": "e4m3"},
        lambda matrix: fp8(matrix, (24, 20), "weight_scale_inv"),
    ),
    "fp8 with modules left out": Scheme(
        {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": [_KEPT]},
        lambda matrix: fp8(matrix, (128, 128), "weight_scale_inv"),
        lambda module: "embed" not in module and module not in ("lm_head", _KEPT),
    ),
    "mxfp4": Scheme(
        {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]},
        mxfp4,
        lambda module: ".experts." in module,
    ),
    "float 8, a scale a matrix": Scheme(
        _compressed("float-quantized", {**_FLOAT, "strategy": "tensor"}, []),
        lambda matrix: fp8(matrix, (0, 0), "weight_scale"),
    ),
    "float 8, a scale a row": Scheme(
        _compressed("float-quantized", {**_FLOAT, "strategy": "channel"}, ["re:.*self_attn.o_proj$"]),
        lambda matrix: fp8(matrix, (1, 0), "weight_scale"),
        lambda module: "embed" not in module and module != "lm_head" and "o_proj" not in module,
    ),
    "int 4": Scheme(
        _compressed("pack-quantized", {**_INT, "symmetric": True}, []),
        lambda matrix: int4(matrix, 16, zero_points=False),
    ),
    "int 4 with zero points": Scheme(
        _compressed("pack-quantized", {**_INT, "symmetric": False}, []),
        lambda matrix: int4(matrix, 16, zero_points=True),
    ),
}
GATES = (".gate.", ".router.", ".shared_expert_gate.")


def write_pair(
    coded: Path, plain: Path, scheme: Scheme, config: Mapping[str, Any] = CONFIG, dtype: str = "float32"
) -> None:
    """Random weights, in `coded` quantised, in `plain` as the numbers that they come to there."""
    write_texts(plain, config)
    write_texts(coded, {**config, "quantization_config": dict(scheme.config)})
    generator = torch.Generator().manual_seed(5)
    codes: Tensors = {}
    numbers: Tensors = {}
    for name, shape in _plain_tensors(plain):
        module = name.removesuffix(".weight")
        value = (torch.randn(shape, generator=generator) * 0.3 + (len(shape) == 1)).to(getattr(torch, dtype))
        matrix = len(shape) == 2 and (name.endswith(".weight") or ".experts." in name)
        if matrix and scheme.only(module) and not any(one in f"{module}." for one in GATES):
            turned = module == name  # experts that lie [in, out], but not their codes
            apart = turned and scheme.coder is not mxfp4
            parts = _one_by_one(module, value.t()) if apart else {module: value.t() if turned else value}
            made = {name: scheme.coder(part.float().numpy()) for name, part in parts.items()}
            codes |= {
                name + ending: tensor for name, one in made.items() for ending, tensor in one.tensors.items()
            }
            both = np.concatenate([one.numbers for one in made.values()])
            value = torch.from_numpy(both.T.copy() if turned else both)
        else:
            codes[name] = value
        numbers[name] = value
    for folder, tensors in ((coded, codes), (plain, numbers)):
        save_file(_stacked(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def _one_by_one(module: str, matrix: torch.Tensor) -> dict[str, torch.Tensor]:
    """An expert's matrix [out, in] that is stacked where it is numbers, as it is called where it is codes."""
    if not module.endswith("gate_up_proj"):
        return {module: matrix}
    prefix = module.removesuffix("gate_up_proj")
    return dict(zip((f"{prefix}gate_proj", f"{prefix}up_proj"), matrix.chunk(2), strict=True))


def _plain_tensors(folder: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield from {piece.tensor: piece.shape for piece in load_spec(folder).pieces()}.items()


def _stacked(tensors: Tensors) -> Tensors:
    """What has no `weight` in its name as such checkpoints have it: all experts in one, gate and up below each other."""
    rest: Tensors = {}
    of_experts: dict[str, dict[int, dict[str, torch.Tensor]]] = {}
    for name, tensor in tensors.items():
        found = re.fullmatch(r"(.*\.experts\.)(\d+)\.(\w+)", name)
        if found is None:
            rest[name] = tensor
            continue
        whole = re.sub(r"^(gate|up)_proj", "gate_up_proj", found[3])
        of_experts.setdefault(found[1] + whole, {}).setdefault(int(found[2]), {})[found[3]] = tensor
    for name, experts in of_experts.items():
        parts = [experts[expert] for expert in range(len(experts))]
        rest[name] = torch.stack([torch.cat([part[one] for one in sorted(part)]) for part in parts])
    return rest


def rewrite_config(folder: Path, **fields: Any) -> None:
    """Other fields of the quantisation in `folder`."""
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] |= fields
    write_json(folder / "config.json", config)
