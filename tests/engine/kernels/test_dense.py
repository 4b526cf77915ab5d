from __future__ import annotations

import pytest
import torch

from elastic_ep.engine.ops_cuda.kernels import dense as module
from elastic_ep.engine.ops_cuda.kernels.dense import DensePlan, dense, plan_of
from tests.engine.kernels.conftest import INTERPRETED
from tests.engine.kernels.errors import relative_error

PLANS = [
    DensePlan(rows=16, columns=64, depth=64, warps=4, stages=3, parted=True),
    DensePlan(rows=64, columns=64, depth=128, warps=4, stages=3, parted=False),
    DensePlan(rows=128, columns=128, depth=64, warps=8, stages=3, parted=False),
]


def operands(rows: int, inner: int, out: int, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    x = torch.randn(rows, inner, device=device)
    return [x.to(dtype), (torch.randn(inner, out, device=device) / inner**0.5).to(dtype)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("rows", "inner", "out"), [(1, 64, 40), (17, 1100, 200), (70, 2048, 64)])
def test_is_the_product(device: torch.device, dtype: torch.dtype, rows: int, inner: int, out: int) -> None:
    """Also where neither pieces nor tiles fit."""
    x, w = operands(rows, inner, out, dtype, device)
    exact = x.double() @ w.double()
    for plan in (None, *PLANS) if dtype == torch.bfloat16 else (None,):
        assert relative_error(dense(x, w, out_dtype=torch.float32, plan=plan), exact) < 3e-6
    own = dense(x, w)
    assert own.dtype == dtype
    assert relative_error(own, exact) < (8e-3 if dtype == torch.bfloat16 else 3e-6)


def test_nothing_of_no_rows(device: torch.device) -> None:
    x, w = operands(0, 64, 40, torch.bfloat16, device)
    assert dense(x, w).shape == (0, 40)


@pytest.mark.skipif(INTERPRETED, reason="slow in the interpreter")
@pytest.mark.parametrize(("inner", "out"), [(2048, 5120), (4096, 2048), (2048, 128), (2880, 201)])
def test_a_row_does_not_know_its_batch(device: torch.device, inner: int, out: int) -> None:
    """In any number of rows, at any place, by any plan."""
    x, w = operands(4096, inner, out, torch.bfloat16, device)
    whole = dense(x, w, out_dtype=torch.float32)
    for rows in (1, 16, 17, 64, 100, 256, 512, 2048):
        part = slice(4096 - rows - rows % 7, 4096 - rows % 7)
        assert torch.equal(dense(x[part], w, out_dtype=torch.float32), whole[part])
    for plan in PLANS:
        assert torch.equal(dense(x[:300], w, out_dtype=torch.float32, plan=plan), whole[:300])


def test_programs_that_share_a_tile_give_the_bits_of_one(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever adds up; and counters are left as they were found."""
    monkeypatch.setattr(module, "PIECE", 128)
    x, w = operands(5, 512, 64, torch.bfloat16, device)
    whole, parted = (
        DensePlan(rows=16, columns=64, depth=64, warps=4, stages=2, parted=parted) for parted in (False, True)
    )
    expected = dense(x, w, out_dtype=torch.float32, plan=whole)
    for _ in range(3):
        assert torch.equal(dense(x, w, out_dtype=torch.float32, plan=parted), expected)


def test_few_tiles_are_shared() -> None:
    assert plan_of(16, 2048, torch.bfloat16).parted
    assert not plan_of(16, 151_936, torch.bfloat16).parted
