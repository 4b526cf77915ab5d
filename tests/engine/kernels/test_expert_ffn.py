from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from elastic_ep.engine.ops_cuda.kernels.expert_ffn import Scaled, expert_ffn
from elastic_ep.engine.ops_cuda.kernels.expert_plan import Plan, Tiles, plan_for
from elastic_ep.models.formats import Fp8
from elastic_ep.models.spec import Clamped
from elastic_ep.weights.dequantise import dequantised
from tests.engine.kernels.conftest import INTERPRETED
from tests.engine.kernels.errors import check
from tests.kit import plain_kernels

DTYPES = [torch.bfloat16, torch.float32]


class Layer:
    """Weights of S slots, H wide with I inside."""

    def __init__(self, device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int]) -> None:
        slots, hidden, inner = shape
        self.gate_up = (torch.randn(slots, hidden, 2 * inner, device=device) / hidden**0.5).to(dtype)
        self.down = (torch.randn(slots, inner, hidden, device=device) / inner**0.5).to(dtype)

    def packed(self, capacity: int, counts: torch.Tensor) -> torch.Tensor:
        """Random rows, and NaN where nothing was received: reading it would show."""
        slots, hidden, _ = self.gate_up.shape
        x = torch.randn(slots, capacity, hidden, device=counts.device).to(self.gate_up.dtype)
        x[torch.arange(capacity, device=counts.device) >= counts[:, None]] = torch.nan
        return x

    def exact(self, packed: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        return plain_kernels.expert_ffn(packed.double(), counts, self.gate_up.double(), self.down.double())


def received(y: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
    """Only the rows that there are."""
    return y[torch.arange(y.shape[1], device=y.device) < counts[:, None]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("count_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("hidden", "inner", "counts"),
    [
        (128, 64, (1, 0, 16, 0, 3)),
        (96, 40, (17, 80)),
        (72, 130, (0, 0, 33)),
        (64, 64, (65,)),
        (200, 24, (0, 5)),
    ],
)
def test_is_the_reference(
    device: torch.device,
    dtype: torch.dtype,
    count_dtype: torch.dtype,
    hidden: int,
    inner: int,
    counts: tuple[int, ...],
) -> None:
    layer = Layer(device, dtype, (len(counts), hidden, inner))
    received_rows = torch.tensor(counts, dtype=count_dtype, device=device)
    packed = layer.packed(80, received_rows)
    y = expert_ffn(packed, received_rows, layer.gate_up, layer.down)
    assert y.dtype == dtype
    exact = layer.exact(packed, received_rows)
    check("expert_ffn", received(y, received_rows), received(exact, received_rows))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [None, Clamped(alpha=1.702, limit=0.5)])
def test_biases_and_a_clamped_activation(
    device: torch.device, dtype: torch.dtype, activation: Clamped | None
) -> None:
    layer = Layer(device, dtype, (3, 72, 40))
    counts = torch.tensor((5, 0, 17), dtype=torch.int32, device=device)
    packed = layer.packed(24, counts)
    biases = torch.randn(3, 80, device=device).to(dtype), torch.randn(3, 72, device=device).to(dtype)
    y = expert_ffn(packed, counts, layer.gate_up, layer.down, biases=biases, activation=activation)
    wide = (packed.double(), counts, layer.gate_up.double(), layer.down.double())
    of_both, of_down = biases
    exact = plain_kernels.expert_ffn(*wide, (of_both.double(), of_down.double()), activation)
    check("expert_ffn", received(y, counts), received(exact, counts))


@pytest.mark.parametrize("out_of_place", [False, True])
@pytest.mark.parametrize("expected_rows", [1, 1000])
def test_rows_in_parts_give_what_they_give_packed(
    device: torch.device, out_of_place: bool, expected_rows: int
) -> None:
    """Parts that are empty, full, and neither; results in the places of the rows, or beside them."""
    parts, size, hidden = 3, 20, 128
    layer = Layer(device, torch.bfloat16, (3, hidden, 64))
    counts = torch.tensor([[0, 20, 3], [7, 0, 1], [0, 0, 0]], dtype=torch.int32, device=device)
    strewn = torch.full((3, parts * size, hidden), torch.nan, dtype=torch.bfloat16, device=device)
    packed = strewn.clone()
    here = (torch.arange(size, device=device) < counts[:, :, None]).view(3, parts * size)
    for slot in range(3):
        rows = torch.randn(int(counts[slot].sum()), hidden, device=device).bfloat16()
        strewn[slot, here[slot]] = packed[slot, : len(rows)] = rows
    whole = counts.sum(dim=1, dtype=torch.int32)
    expected = expert_ffn(packed, whole, layer.gate_up, layer.down, expected_rows=expected_rows)
    y = expert_ffn(
        strewn, counts, layer.gate_up, layer.down,
        expected_rows=expected_rows, out=None if out_of_place else strewn,
    )  # fmt: skip
    for slot in range(3):
        assert torch.equal(y[slot, here[slot]], expected[slot, : int(whole[slot])])


def test_no_rows_at_all(device: torch.device) -> None:
    layer = Layer(device, torch.bfloat16, (3, 64, 64))
    counts = torch.zeros(3, dtype=torch.int32, device=device)
    assert expert_ffn(layer.packed(16, counts), counts, layer.gate_up, layer.down).shape == (3, 16, 64)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("expected_rows", [1, 1000])
def test_a_plan_for_other_counts_is_as_right(
    device: torch.device, dtype: torch.dtype, expected_rows: int
) -> None:
    layer = Layer(device, dtype, (3, 64, 48))
    counts = torch.tensor([150, 2, 40], device=device)
    packed = layer.packed(160, counts)
    y = expert_ffn(packed, counts, layer.gate_up, layer.down, expected_rows=expected_rows)
    check("expert_ffn", received(y, counts), received(layer.exact(packed, counts), counts))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_know_its_place(device: torch.device, dtype: torch.dtype) -> None:
    """The same expert in both slots, the same rows elsewhere among others."""
    layer = Layer(device, dtype, (1, 128, 96))
    gate_up, down = (weights.expand(2, -1, -1).contiguous() for weights in (layer.gate_up, layer.down))
    counts = torch.tensor([9, 14], device=device)
    packed = layer.packed(16, torch.tensor([16], device=device)).repeat(2, 1, 1)
    packed[1] = packed[0].roll(5, dims=0)
    y = expert_ffn(packed, counts, gate_up, down)
    assert torch.equal(y[1, 5:14], y[0, :9])


@pytest.mark.skipif(INTERPRETED, reason="slow in the interpreter")
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_shape_of_tile_gives_the_same_bits(device: torch.device, dtype: torch.dtype) -> None:
    layer = Layer(device, dtype, (2, 1024, 384))
    packed = layer.packed(300, torch.tensor([300, 300], device=device))
    many = torch.tensor([300, 300], device=device)
    expected = expert_ffn(packed, many, layer.gate_up, layer.down, plan=plan_for(1000, dtype))
    tiles = Tiles(rows=32, few=16, columns=64, depth=32, warps=4, stages=3, per_processor=1)
    for plan in (plan_for(1, dtype), plan_for(1000, dtype), Plan(tiles, tiles)):
        for count in (1, 16, 17, 64, 65, 128, 130, 300):
            counts = torch.tensor([count, 1], device=device)
            y = expert_ffn(packed, counts, layer.gate_up, layer.down, plan=plan)
            assert torch.equal(y[0, :count], expected[0, :count])
            assert torch.equal(y[1, :1], expected[1, :1])


class Coded:
    """Weights of S slots in float8: pieces of [out, in], each with scales for its own blocks of `block`."""

    def __init__(self, device: torch.device, shape: tuple[int, int, int], block: tuple[int, int]) -> None:
        self.slots, self.hidden, self.inner = shape
        self._format = Fp8(*block, "weight_scale")
        self.gate_up, gate_up = self._made(device, [(self.inner, self.hidden)] * 2)
        self.down, down = self._made(device, [(self.hidden, self.inner)])
        self.numbers = Layer.__new__(Layer)
        self.numbers.gate_up, self.numbers.down = gate_up.double(), down.double()

    def _made(self, device: torch.device, pieces: list[tuple[int, int]]) -> tuple[Scaled, torch.Tensor]:
        codes, scales, numbers = [], [], []
        for shape in pieces:
            _, need = self._format.needs("m", shape, None)
            code = torch.randn(self.slots, *shape).to(torch.float8_e4m3fn)
            scale = (torch.rand(self.slots, *need.shape) + 0.5) / shape[1] ** 0.5
            both = ({"codes": code[slot], "scales": scale[slot]} for slot in range(self.slots))
            numbers.append(torch.stack([dequantised(self._format, one, shape).t() for one in both]))
            codes.append(code.view(torch.uint8))
            scales.append(scale)
        held = torch.cat(codes, dim=1).to(device).view(torch.float8_e4m3fn)
        made = Scaled(held, torch.cat(scales, dim=1).to(device), self._format.rows, self._format.columns)
        return made, torch.cat(numbers, dim=2).to(device)


BLOCKS = [(128, 128), (0, 0), (1, 0), (24, 64)]


@pytest.mark.parametrize(
    ("dtype", "block", "hidden", "inner", "counts"),
    [
        *((torch.bfloat16, block, 72, 40, (3,)) for block in BLOCKS),
        (torch.float32, (128, 64), 72, 40, (2,)),
        (torch.bfloat16, (128, 128), 136, 144, (1, 0, 17)),
    ],
)
def test_codes_give_what_their_numbers_give(
    device: torch.device,
    dtype: torch.dtype,
    block: tuple[int, int],
    hidden: int,
    inner: int,
    counts: tuple[int, ...],
) -> None:
    """Also where the last blocks are short, and up's begin within a block of gate's."""
    coded = Coded(device, (len(counts), hidden, inner), block)
    rows = torch.tensor(counts, dtype=torch.int32, device=device)
    packed = coded.numbers.packed(40, rows).to(dtype)
    y = expert_ffn(packed, rows, coded.gate_up, coded.down)
    check("expert_ffn", received(y, rows), received(coded.numbers.exact(packed, rows), rows))


def test_a_row_of_codes_does_not_know_its_place(device: torch.device) -> None:
    coded = Coded(device, (1, 72, 40), (128, 64))
    gate_up, down = (
        replace(
            one,
            codes=one.codes.view(torch.uint8).repeat(2, 1, 1).view(torch.float8_e4m3fn),
            scales=one.scales.repeat(2, 1, 1),
        )
        for one in (coded.gate_up, coded.down)
    )
    counts = torch.tensor([9, 14], device=device)
    packed = coded.numbers.packed(16, torch.tensor([16], device=device)).bfloat16().repeat(2, 1, 1)
    packed[1] = packed[0].roll(5, dims=0)
    y = expert_ffn(packed, counts, gate_up, down)
    assert torch.equal(y[1, 5:14], y[0, :9])


def test_blocks_that_a_step_of_the_sum_would_cross_are_refused(device: torch.device) -> None:
    coded = Coded(device, (1, 128, 96), (128, 96))
    packed, counts = torch.zeros(1, 16, 128, device=device), torch.ones(1, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="a multiple of 64"):
        expert_ffn(packed, counts, coded.gate_up, coded.down)


@pytest.mark.skipif(INTERPRETED, reason="slow in the interpreter")
def test_every_shape_of_tile_gives_the_same_bits_of_codes(device: torch.device) -> None:
    coded = Coded(device, (2, 1024, 384), (128, 128))
    many = torch.tensor([300, 300], device=device)
    packed = coded.numbers.packed(300, many).bfloat16()
    expected = expert_ffn(packed, many, coded.gate_up, coded.down, plan=plan_for(1000, torch.bfloat16))
    tiles = Tiles(rows=32, few=16, columns=64, depth=32, warps=4, stages=3, per_processor=1)
    for plan in (plan_for(1, torch.bfloat16), Plan(tiles, tiles)):
        for count in (1, 16, 17, 65, 128, 300):
            counts = torch.tensor([count, 1], device=device)
            y = expert_ffn(packed, counts, coded.gate_up, coded.down, plan=plan)
            assert torch.equal(y[0, :count], expected[0, :count])
            assert torch.equal(y[1, :1], expected[1, :1])
