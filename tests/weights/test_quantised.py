"""Quantised checkpoints: the numbers are those that the formats define, whatever the shapes; experts keep their codes."""

from __future__ import annotations

import ctypes
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from elastic_ep.config import EngineLimits
from elastic_ep.models import gpt_oss
from elastic_ep.models.formats import ROW_GROUP, Format, Fp8, Int4, Mxfp4, Stacked
from elastic_ep.models.quantisation import METHODS
from elastic_ep.models.registry import ARCHITECTURE_TYPES, load_spec
from elastic_ep.placement import Placement, launch_placement
from elastic_ep.run import BUNDLED_MODEL
from elastic_ep.weights.arranged import arranged
from elastic_ep.weights.bank import Held, Weights, blank_weights, dummy_source, load_weights
from elastic_ep.weights.dequantise import dequantised
from elastic_ep.weights.peers import ExpertPull, publish, pull_experts
from tests.e2e.test_families import SHAPES
from tests.engine.solo import assign, drain
from tests.engine.test_invariance import recorded_logits
from tests.kit.coded_experts import as_stored
from tests.kit.fused import fused_runner, needs_fused
from tests.kit.quantised import SCHEMES, Coded, e4m3, fp8, int4, mxfp4, write_pair
from tests.models.folders import CONFIG

SIZES = st.integers(1, 40)
SHORT: dict[str, Any] = {
    **CONFIG,
    "hidden_size": 64,
    "moe_intermediate_size": 32,
    "num_hidden_layers": 2,
    "head_dim": 20,
}
"""No multiple of the blocks of `SCHEMES`, but of 32 in what MXFP4 has."""


def matrix(out: int, inner: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal((out, inner)).astype(np.float32)


def numbers(made: Format, coded: Coded) -> torch.Tensor:
    """Of what a checkpoint holds, brought to the shapes in which ranks hold it."""
    shape = coded.numbers.shape
    whole = Stacked("m", (1, *shape))
    parts = {}
    for need in made.needs("m.weight", shape, whole):
        tensor = coded.tensors[need.tensor.removeprefix("m")]
        parts[need.role] = (tensor.float() if need.held == "F32" else tensor).reshape(need.shape)
    return dequantised(made, parts, shape)


def same(made: Format, coded: Coded) -> None:
    found = numbers(made, coded).numpy()
    assert found.dtype == np.float32
    assert found.tobytes() == coded.numbers.tobytes()


@settings(max_examples=60, deadline=None)
@given(SIZES, SIZES, st.integers(0, 16), st.integers(0, 16), st.integers(0, 99))
def test_float_8_in_blocks_of_any_size(out: int, inner: int, rows: int, columns: int, seed: int) -> None:
    coded = fp8(matrix(out, inner, seed), (rows, columns), "weight_scale_inv")
    same(Fp8(rows, columns, "weight_scale_inv"), coded)


@pytest.mark.parametrize(("out", "inner"), [(128, 128), (129, 127), (200, 300)])
def test_float_8_in_blocks_of_128_of_which_the_last_are_short(out: int, inner: int) -> None:
    same(Fp8(128, 128, "weight_scale_inv"), fp8(matrix(out, inner), (128, 128), "weight_scale_inv"))


def test_every_code_of_float_8() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).view(1, -1)
    found = dequantised(Fp8(0, 0, "s"), {"codes": codes, "scales": torch.ones(1, 1)}, (1, 256))
    expected = torch.tensor([[e4m3(code) for code in range(256)]])
    assert torch.equal(found.nan_to_num(7777), expected.nan_to_num(7777))


@settings(max_examples=60, deadline=None)
@given(SIZES, SIZES, st.integers(0, 16), st.booleans(), st.integers(0, 99))
def test_int_4_in_groups_of_any_size(out: int, inner: int, group: int, zero_points: bool, seed: int) -> None:
    coded = int4(matrix(out, inner, seed) + 0.3, group, zero_points=zero_points)
    same(Int4(group, zero_points), coded)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 9), st.integers(1, 3), st.integers(0, 99))
def test_mxfp4(out: int, blocks: int, seed: int) -> None:
    same(Mxfp4(), mxfp4(matrix(out, 32 * blocks, seed)))


def test_every_exponent_and_code_of_mxfp4() -> None:
    codes = torch.arange(256, dtype=torch.uint8).repeat(256).view(16 * 256, 16)
    exponents = torch.arange(256, dtype=torch.uint8).repeat_interleave(16).view(-1, 1)
    found = dequantised(Mxfp4(), {"codes": codes, "scales": exponents}, (16 * 256, 32)).view(256, 256, 2)
    table = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    table += [-one for one in table]
    for exponent in (0, 1, 100, 127, 128, 254):
        expected = [[table[code & 15], table[code >> 4]] for code in range(256)]
        power = torch.tensor(2.0, dtype=torch.float64) ** (exponent - 127)
        assert torch.equal(found[exponent], (torch.tensor(expected).double() * power).float())
    assert found[255].isnan().all(), "as the specification has it"


def whole(folder: Path, **more: Any) -> tuple[Weights, Placement]:
    spec = load_spec(folder)
    placement = launch_placement(1, spec.moe_layers, spec.moe.experts, 1, num_spare=1)
    return load_weights(folder, spec, placement, 0, **more), placement


@pytest.fixture(scope="module", params=SCHEMES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("pair")
    write_pair(folder / "coded", folder / "plain", SCHEMES[request.param], SHORT)
    return folder / "coded", folder / "plain"


FAMILY_SIZES = {"num_hidden_layers": 2, "hidden_size": 64, "vocab_size": 99, "intermediate_size": 64}
FAMILY_SIZES |= {"moe_intermediate_size": 64}


@pytest.mark.parametrize("architecture", sorted(SHAPES))
def test_every_family_may_be_quantised(tmp_path: Path, architecture: str) -> None:
    """gpt-oss as its checkpoints are; the others in float 8, all matrices but gates, embeddings and the head."""
    scheme = SCHEMES["mxfp4" if architecture == gpt_oss.ARCHITECTURE else "fp8"]
    named = {"architectures": [architecture], "model_type": ARCHITECTURE_TYPES[architecture]}
    shape = {**named, **SHAPES[architecture], **FAMILY_SIZES}
    config = json.loads((BUNDLED_MODEL / "config.json").read_text()) | shape
    write_pair(tmp_path / "coded", tmp_path / "plain", scheme, config)
    (coded, _), (plain, _) = whole(tmp_path / "coded"), whole(tmp_path / "plain")
    for ours, theirs in zip([coded.outside, *coded.layers], [plain.outside, *plain.layers], strict=True):
        for name, expected in theirs.items():
            assert torch.equal(ours[name].view(torch.int32), expected.view(torch.int32)), name
    held = coded.expert_parts(0)
    assert {"gate_up.codes", "gate_up.scales", "down.codes", "down.scales"} <= set(held)
    assert ("gate_up_bias" in held) == (architecture == gpt_oss.ARCHITECTURE)
    quantised = [piece for piece in coded.spec.pieces() if piece.format.quantised]
    assert any("self_attn" in piece.tensor for piece in quantised) == (architecture != gpt_oss.ARCHITECTURE)


def test_what_ranks_compute_with_is_what_the_plain_twin_has(pair: tuple[Path, Path]) -> None:
    (coded, _), (plain, _) = whole(pair[0]), whole(pair[1])
    for ours, theirs in zip(coded.layers, plain.layers, strict=True):
        for name, expected in theirs.items():
            assert torch.equal(ours[name].view(torch.int32), expected.view(torch.int32)), name
    assert coded.dense_checksum() == plain.dense_checksum()
    assert coded.spec.quantisation in ("fp8", "mxfp4", "compressed-tensors")


def test_an_expert_is_its_codes_and_scales(pair: tuple[Path, Path]) -> None:
    """A quarter of the bytes of float32, or an eighth; and the same for every copy."""
    (coded, placement), (plain, _) = whole(pair[0]), whole(pair[1])
    size = sum(part.nbytes for part in coded.slot(0, 0))
    assert size == coded.spec.expert_bytes(4)
    assert size < 0.4 * sum(part.nbytes for part in plain.slot(0, 0))
    row = placement.on_rank(0, 0)
    copies = [slot for slot, logical in enumerate(row) if row.count(logical) == 2]
    assert len({coded.checksum(0, slot) for slot in copies}) == 1
    assert len({coded.checksum(0, slot) for slot in range(len(row))}) == len(set(row))


def test_a_flipped_bit_of_any_part_is_noticed_and_mended(pair: tuple[Path, Path]) -> None:
    """Of codes, of scales, and of the numbers beside them, which are what is computed with."""
    weights, placement = whole(pair[0])
    logical = placement.on_rank(1, 0)[0]
    right = weights.checksum(1, 0)
    names = [*weights.expert_parts(1), *(part.name for part in weights.spec.moe.parts)]
    assert len(names) == len(set(names)) >= 6
    for name in names:
        part = weights.layers[1][name][0]
        before = part.clone()
        part.view(torch.uint8).view(-1)[-1] ^= 1
        assert weights.checksum(1, 0) != right, name
        weights.load_expert(1, 0, logical)
        assert weights.checksum(1, 0) == right
        assert torch.equal(part.view(torch.uint8), before.view(torch.uint8)), name


class Local:
    """A plane whose peers are all in this process."""

    session = "here"

    def register(self, regions: object) -> None:
        pass

    def read(self, session: str, parts: Sequence[tuple[int, int]]) -> LocalRead:
        return LocalRead(torch.cat([_memory(address, size) for address, size in parts]))


class LocalRead:
    def __init__(self, data: torch.Tensor) -> None:
        self._data = data

    def __enter__(self) -> LocalRead:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def wait(self, deadline_s: float) -> torch.Tensor:
        return self._data


def _memory(address: int, size: int) -> torch.Tensor:
    return torch.frombuffer((ctypes.c_uint8 * size).from_address(address), dtype=torch.uint8).clone()


def test_an_expert_that_is_pulled_comes_with_its_numbers(pair: tuple[Path, Path]) -> None:
    """Codes and scales travel, nothing else; who pulls makes the numbers of them, and of no others."""
    theirs, placement = whole(pair[0])
    mine = blank_weights(theirs.spec, placement.slots_per_rank, theirs.source)
    plane: Any = Local()
    address = publish(plane, theirs)
    slot, right = 2, theirs.checksum(1, 2)
    wrong = ExpertPull(address, slot, 1, 0, right ^ 1)
    (refused,) = pull_experts(plane, mine, [wrong], 9)
    assert refused.checksum is None
    assert not mine.layers[1]["down"][0].any(), "no byte was written"
    (pulled,) = pull_experts(plane, mine, [replace(wrong, checksum=right)], 9)
    assert pulled.checksum == right == mine.checksum(1, 0)
    for part in theirs.spec.moe.parts:
        assert torch.equal(mine.layers[1][part.name][0], theirs.layers[1][part.name][slot])
        assert theirs.layers[1][part.name][slot].any()


def test_codes_and_scales_may_be_in_different_shards(tmp_path: Path) -> None:
    write_pair(tmp_path / "coded", tmp_path / "plain", SCHEMES["fp8"], SHORT)
    expected = whole(tmp_path / "coded")[0].checksum(1, 0)
    file = tmp_path / "coded" / "model.safetensors"
    tensors = load_file(file)
    file.unlink()
    weight_map = {name: f"model-{int('_scale' in name)}.safetensors" for name in tensors}
    for shard in set(weight_map.values()):
        part = {name: tensor for name, tensor in tensors.items() if weight_map[name] == shard}
        save_file(part, tmp_path / "coded" / shard)
    (tmp_path / "coded" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert whole(tmp_path / "coded")[0].checksum(1, 0) == expected


@needs_fused()
def test_the_engine_in_c_computes_with_the_numbers(pair: tuple[Path, Path]) -> None:
    """Logits of the twin, to the bit; also rounded to bfloat16, which it keeps as such."""
    for dtype, rounding in ((torch.float32, ""), (torch.bfloat16, "bfloat16")):
        seen = []
        for folder in pair:
            spec = load_spec(folder)
            placement = launch_placement(1, spec.moe_layers, spec.moe.experts, 0)
            weights = load_weights(folder, spec, placement, 0, dtype=dtype, rounding=rounding)
            runner, _ = fused_runner(weights, EngineLimits(max_model_len=64, num_pages=8))
            runner.add(assign(1, [5, 17, 4, 33], max_tokens=5))
            with recorded_logits() as logits:
                drain(runner)
            seen.append(torch.stack([logits[key] for key in sorted(logits)]))
        assert torch.equal(seen[0], seen[1])


def test_what_is_held_can_be_codes_or_numbers_alone(pair: tuple[Path, Path]) -> None:
    (both, _), (codes, _), (numbers, _) = (whole(pair[0], held=held) for held in Held)
    for part in codes.spec.moe.parts:
        piece = part.pieces[0]
        for kept, need in zip(part.kept, piece.needs, strict=True):
            lies, stored = (held.layers[0][kept.name][0] for held in (codes, both))
            of_one = lies.view(torch.uint8).chunk(2 if piece.alternating else len(part.pieces))
            own = [
                as_stored(piece.format, need.role, one.view(lies.dtype)).view(torch.uint8) for one in of_one
            ]
            rows = torch.stack(own, dim=1).flatten(0, 1) if piece.alternating else torch.cat(own)
            assert torch.equal(rows, stored.view(torch.uint8))
    assert not {part.name for part in codes.spec.moe.parts} & codes.layers[0].keys()
    assert numbers.expert_parts(0) == [part.name for part in numbers.spec.moe.parts]
    for name in numbers.expert_parts(0):
        assert torch.equal(numbers.layers[0][name], both.layers[0][name])


def test_codes_that_a_gpu_cannot_have_are_refused() -> None:
    with pytest.raises(ValueError, match="multiple of 32"):
        arranged(Int4(0, False), "codes", torch.zeros(2, 5, dtype=torch.int32))
    scales = torch.full((2, 3), 128, dtype=torch.uint8)
    assert arranged(Mxfp4(), "scales", scales).shape == scales.shape
    with pytest.raises(ValueError, match=r"above 2 \*\* 1"):
        arranged(Mxfp4(), "scales", scales + 1)


def test_dense_matrices_in_fp8_may_stay_codes(tmp_path: Path) -> None:
    """With a scale for each row and group of 128 columns, whatever the checkpoint has."""
    write_pair(tmp_path / "coded", tmp_path / "plain", SCHEMES["fp8 with modules left out"], SHORT)
    (both, _), (codes, _) = (whole(tmp_path / "coded", held=held) for held in (Held.BOTH, Held.CODES))
    kept = [part for part in codes.spec.layers[0].dense if part.coded_dense]
    assert "qkv" in {part.name for part in kept}
    for part in kept:
        lies, scales = (codes.layers[0][f"{part.name}.{what}"] for what in ("codes", "scales"))
        assert lies.nbytes + scales.nbytes == part.dense_nbytes(2)
        wide = scales.t().repeat_interleave(ROW_GROUP, dim=1)[:, : lies.shape[1]]
        assert torch.equal((lies.float() * wide).t(), both.layers[0][part.name])
        assert f"layers.0.{part.name}.codes" in codes.dense()
        assert part.name not in codes.layers[0]


def test_random_weights_have_the_checkpoints_shapes(pair: tuple[Path, Path]) -> None:
    weights, placement = whole(pair[0])
    made = Weights(weights.spec, placement, 0, dummy_source(weights.spec, 3), torch.device("cpu"))
    for ours, theirs in zip(made.layers, weights.layers, strict=True):
        assert {name: (one.shape, one.dtype) for name, one in ours.items()} == {
            name: (one.shape, one.dtype) for name, one in theirs.items()
        }
        for name in ("gate_up", "down"):
            assert 0.005 < ours[name].std() < 0.2
    blank = blank_weights(weights.spec, placement.slots_per_rank, dummy_source(weights.spec, 3))
    blank.load_expert(0, 1, 2)
    row = placement.on_rank(0, 0)
    assert blank.checksum(0, 1) == made.checksum(0, row.index(2))


@pytest.mark.parametrize("rounding", ["bfloat16", "float16"])
def test_numbers_are_rounded_as_asked(pair: tuple[Path, Path], rounding: str) -> None:
    (coded, _), (plain, _) = whole(pair[0], rounding=rounding), whole(pair[1])
    dtype = getattr(torch, rounding)
    for ours, theirs in zip(coded.layers, plain.layers, strict=True):
        for name, exact in theirs.items():
            assert torch.equal(ours[name], exact.to(dtype).float()), name
    assert coded.checksum(0, 0) == whole(pair[0])[0].checksum(0, 0), "codes are as they are"


def test_a_scheme_of_each_kind_is_tried() -> None:
    methods = {scheme.config["quant_method"] for scheme in SCHEMES.values()}
    assert methods == set(METHODS)
