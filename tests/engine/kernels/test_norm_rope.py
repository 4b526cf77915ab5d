from __future__ import annotations

import pytest
import torch

from elastic_ep.engine.ops_cuda.kernels.norm_rope import add_rms_norm, norm_rope_write
from tests.engine.kernels.errors import check
from tests.kit import plain_kernels

DTYPES = [torch.bfloat16, torch.float32]
EPS = 1e-6
PAGES, PAGE = 5, 4
UNTOUCHED = 77.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "hidden"), [(1, 64), (7, 96), (3, 2048), (2, 130)])
def test_norm_of_the_sum(device: torch.device, dtype: torch.dtype, tokens: int, hidden: int) -> None:
    x, residual = (torch.randn(tokens, hidden, device=device).to(dtype) for _ in range(2))
    weight = torch.rand(hidden, device=device).to(dtype)
    normed, total = add_rms_norm(x, residual, weight, EPS)
    exact_normed, exact_total = plain_kernels.add_rms_norm(
        x.double(), residual.double(), weight.double(), EPS
    )
    assert normed.dtype == total.dtype == dtype
    check("add_rms_norm", normed, exact_normed)
    check("add_rms_norm", total, exact_total)


def test_norm_without_a_residual(device: torch.device) -> None:
    x, weight = torch.randn(3, 48, device=device), torch.rand(48, device=device)
    normed, total = add_rms_norm(x, None, weight, EPS)
    check("add_rms_norm", normed, plain_kernels.add_rms_norm(x.double(), None, weight.double(), EPS)[0])
    assert total is x


def test_a_residual_may_be_float32_beside_bfloat16(device: torch.device) -> None:
    x, residual = torch.randn(3, 48, device=device).bfloat16(), torch.randn(3, 48, device=device)
    weight = torch.rand(48, device=device)
    normed, total = add_rms_norm(x, residual, weight, EPS)
    assert (normed.dtype, total.dtype) == (torch.bfloat16, torch.float32)
    exact_normed, exact_total = plain_kernels.add_rms_norm(
        x.double(), residual.double(), weight.double(), EPS
    )
    check("add_rms_norm", normed, exact_normed)
    check("add_rms_norm", total, exact_total)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_know_its_batch(device: torch.device, dtype: torch.dtype) -> None:
    x, residual = (torch.randn(9, 200, device=device).to(dtype) for _ in range(2))
    weight = torch.rand(200, device=device).to(dtype)
    whole = add_rms_norm(x, residual, weight, EPS)
    part = add_rms_norm(x[4:6], residual[4:6], weight, EPS)
    assert torch.equal(part[0], whole[0][4:6])
    assert torch.equal(part[1], whole[1][4:6])


class Rows:
    """Inputs of `norm_rope_write` for `tokens` rows; each third row is padding."""

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        tokens: int,
        shape: tuple[int, int, int],
        rotated: int | None = None,
    ) -> None:
        heads, self.kv_heads, self.dim = shape
        self.qkv = torch.randn(tokens, (heads + 2 * self.kv_heads) * self.dim, device=device).to(dtype)
        self.norm = torch.rand(heads + self.kv_heads, self.dim, device=device).to(dtype)
        angles = torch.rand(50, (rotated or self.dim) // 2, device=device) * 6
        self.cos, self.sin = angles.cos(), angles.sin()
        self.positions = torch.randint(0, 50, (tokens,), device=device)
        self.slots = torch.randperm(PAGES * PAGE, device=device)[:tokens]
        self.slots[2::3] = -1

    def cache(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        shape = PAGES, self.kv_heads, PAGE, self.dim
        return tuple(torch.full(shape, UNTOUCHED, dtype=dtype, device=self.qkv.device) for _ in range(2))  # type: ignore[return-value]  # two


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 2, 32), (8, 1, 128), (3, 3, 40), (2, 1, 96), (14, 2, 64)])
@pytest.mark.parametrize("tokens", [1, 7])
@pytest.mark.parametrize(("normed", "clip"), [(True, None), (False, None), (True, 0.5), (False, 0.5)])
def test_norm_rope_write(
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    tokens: int,
    normed: bool,
    clip: float | None,
) -> None:
    rows = Rows(device, dtype, tokens, shape)
    norm = rows.norm if normed else None
    keys, values = rows.cache(dtype)
    q = norm_rope_write(
        rows.qkv, norm, rows.cos, rows.sin, rows.positions, rows.slots, keys, values, EPS, clip
    )
    exact_keys, exact_values = rows.cache(torch.float64)
    exact = plain_kernels.norm_rope_write(
        rows.qkv.double(),
        None if norm is None else norm.double(),
        rows.cos,
        rows.sin,
        rows.positions,
        rows.slots,
        exact_keys,
        exact_values,
        EPS,
        clip,
    )
    check("norm_rope", q, exact)
    assert torch.equal(keys == UNTOUCHED, exact_keys == UNTOUCHED)
    check("norm_rope", keys, exact_keys)
    assert torch.equal(values.double(), exact_values)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("shape", "rotated"), [((4, 2, 32), 16), ((3, 3, 40), 6), ((8, 1, 64), 64)])
@pytest.mark.parametrize("normed", [False, True])
def test_rotary_embeddings_of_a_part_of_a_head(
    device: torch.device, shape: tuple[int, int, int], rotated: int, interleaved: bool, normed: bool
) -> None:
    rows = Rows(device, torch.float32, 5, shape, rotated)
    norm = rows.norm if normed else None
    places = rows.cos, rows.sin, rows.positions, rows.slots
    keys, values = rows.cache(torch.float32)
    q = norm_rope_write(rows.qkv, norm, *places, keys, values, EPS, interleaved=interleaved)
    exact = rows.cache(torch.float64)
    expected = plain_kernels.norm_rope_write(
        rows.qkv.double(),
        None if norm is None else norm.double(),
        *places,
        *exact,
        EPS,
        interleaved=interleaved,
    )
    check("norm_rope", q, expected)
    check("norm_rope", keys, exact[0])
    assert torch.equal(values.double(), exact[1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_does_not_know_its_batch(device: torch.device, dtype: torch.dtype) -> None:
    rows = Rows(device, dtype, 9, (4, 2, 64))
    whole, part = rows.cache(dtype), rows.cache(dtype)
    some = slice(3, 5)
    q = norm_rope_write(rows.qkv, rows.norm, rows.cos, rows.sin, rows.positions, rows.slots, *whole, EPS)
    its = norm_rope_write(
        rows.qkv[some], rows.norm, rows.cos, rows.sin, rows.positions[some], rows.slots[some], *part, EPS
    )
    assert torch.equal(its, q[some])
    for slot in rows.slots[some].tolist():
        assert torch.equal(part[0][slot // PAGE, :, slot % PAGE], whole[0][slot // PAGE, :, slot % PAGE])
