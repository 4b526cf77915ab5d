from __future__ import annotations

import pytest
import torch

from elastic_ep.engine.ops_cuda.kernels import dense_codes as module
from elastic_ep.engine.ops_cuda.kernels.dense import DensePlan
from elastic_ep.engine.ops_cuda.kernels.dense_codes import DenseCodes, dense_codes
from elastic_ep.models.formats import Fp8
from elastic_ep.weights.arranged import dense_scales
from elastic_ep.weights.dequantise import dequantised
from tests.engine.kernels.conftest import INTERPRETED
from tests.engine.kernels.errors import relative_error
from tests.kit import plain_kernels

PLANS = [
    DensePlan(rows=16, columns=64, depth=128, warps=4, stages=3, parted=True),
    DensePlan(rows=64, columns=128, depth=128, warps=4, stages=3, parted=False),
]


def weights(
    device: torch.device, inner: int, out: int, blocks: tuple[int, int]
) -> tuple[DenseCodes, torch.Tensor]:
    """And the numbers that they come to, [in, out] float64."""
    rows, columns = blocks
    codes = torch.randn(out, inner, device=device).to(torch.float8_e4m3fn)
    grid = -(-out // rows) if rows else 1, -(-inner // columns) if columns else 1
    scales = (torch.rand(grid, device=device) + 0.5) / 64
    form = Fp8(rows, columns, "weight_scale_inv")
    numbers = dequantised(form, {"codes": codes, "scales": scales}, (out, inner)).double().t()
    return DenseCodes(codes, dense_scales(form, scales, (out, inner)).contiguous()), numbers


@pytest.mark.parametrize("blocks", [(128, 128), (1, 0), (0, 0), (128, 256)])
@pytest.mark.parametrize(("rows", "inner", "out"), [(1, 64, 40), (17, 1104, 200), (20, 2048, 64)])
def test_is_the_product_of_rows_that_became_codes(
    device: torch.device, rows: int, inner: int, out: int, blocks: tuple[int, int]
) -> None:
    """Also where neither pieces nor tiles fit."""
    made, numbers = weights(device, inner, out, blocks)
    x = torch.randn(rows, inner, device=device).bfloat16()
    exact = plain_kernels.coded_rows(x.cpu().double()).to(device) @ numbers
    for plan in (None, *PLANS) if blocks == (128, 128) else (None,):
        y = dense_codes(x, made, plan=plan)
        assert y.dtype == x.dtype
        # A number between two codes may become either on a GPU, whose division is another.
        assert relative_error(y, exact) < (8e-3 if INTERPRETED else 3e-2)


def test_nothing_of_no_rows(device: torch.device) -> None:
    made, _ = weights(device, 64, 40, (128, 128))
    assert dense_codes(torch.empty(0, 64, device=device).bfloat16(), made).shape == (0, 40)


def test_steps_of_another_length_are_refused(device: torch.device) -> None:
    made, _ = weights(device, 64, 40, (128, 128))
    with pytest.raises(ValueError, match="128 expected"):
        dense_codes(torch.ones(1, 64, device=device).bfloat16(), made, plan=DensePlan(16, 64, 64, 4, 3, True))


def test_a_row_does_not_know_its_batch(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """In any number of rows, at any place, by any plan, whoever adds up the pieces."""
    if INTERPRETED:
        monkeypatch.setattr(module, "PIECE", 256)
    rows, inner, out = (20, 600, 72) if INTERPRETED else (2100, 7168, 2112)
    made, _ = weights(device, inner, out, (128, 128))
    x = torch.randn(rows, inner, device=device).bfloat16()
    whole = dense_codes(x, made)
    for count in (1, 17) if INTERPRETED else (1, 16, 17, 64, 200, 300, 1100):
        part = slice(rows - count - count % 7, rows - count % 7)
        assert torch.equal(dense_codes(x[part], made), whole[part])
    for plan in PLANS:
        assert torch.equal(dense_codes(x[:300], made, plan=plan), whole[:300])
