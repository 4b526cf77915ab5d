from __future__ import annotations

from typing import Any

import pytest
import torch

from elastic_ep.engine.ops_cuda.kernels import latent_attention
from elastic_ep.engine.ops_cuda.kernels.by_head import by_head
from elastic_ep.engine.ops_cuda.kernels.latent_attention import latent_decode, latent_prefill
from elastic_ep.engine.ops_cuda.kernels.latent_write import latent_write
from elastic_ep.engine.ops_cuda.kernels.paged_attention import Cut
from tests.engine.kernels.conftest import INTERPRETED
from tests.engine.kernels.errors import check
from tests.kit import plain_kernels

DTYPES = [torch.bfloat16, torch.float32]
CUT = Cut(split=64, block=32)
"""So that small contexts have several splits."""
SHAPES = [(4, 32, 8, 16), (20, 40, 8, 8), (66, 16, 16, 32)]
if not INTERPRETED:
    SHAPES += [(16, 512, 64, 16), (128, 512, 64, 16)]
"""Heads, numbers of a latent, of the end of a key, page size."""


class Latents:
    """Random latents of sequences of `lengths` tokens, pages strewn; what no sequence owns is NaN."""

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        lengths: tuple[int, ...],
        rank: int = 32,
        rope: int = 8,
        page: int = 16,
    ) -> None:
        counts = [-(-length // page) for length in lengths]
        total = sum(counts) + 2
        owned = torch.randperm(total)
        self.rank = rank
        self.cache = torch.full((total, page, rank + rope), torch.nan, dtype=dtype, device=device)
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
        self.tables = torch.full((len(lengths), max(counts) + 3), total - 1, dtype=torch.int32, device=device)
        for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            mine, owned = owned[:count], owned[count:]
            self.tables[row, :count] = mine.to(device)
            fresh = torch.randn(count * page, rank + rope, device=device).to(dtype)
            fresh[length:] = torch.nan
            self.cache[mine.to(device)] = fresh.view(count, page, rank + rope)

    def queries(self, tokens: int, heads: int) -> torch.Tensor:
        """Three times the usual size: the softmax then has to choose."""
        shape = tokens, heads, self.cache.shape[-1]
        return 3 * torch.randn(shape, device=self.cache.device).to(self.cache.dtype)

    def bounds(self, sizes: tuple[int, ...]) -> torch.Tensor:
        return torch.tensor((0, *sizes), device=self.cache.device).cumsum(0).to(torch.int32)

    @property
    def said(self) -> dict[str, Any]:
        return {"rank": self.rank, "scale": self.cache.shape[-1] ** -0.5}

    def exact(self, q: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
        places = self.tables, self.bounds(sizes), self.lengths
        return plain_kernels.latent_attention(q.double(), self.cache.double(), *places, **self.said)

    def prefill(self, q: torch.Tensor, sizes: tuple[int, ...], cut: Cut | None = CUT) -> torch.Tensor:
        return latent_prefill(
            q, self.cache, self.tables, self.bounds(sizes), self.lengths, cut=cut, **self.said
        )

    def decode(self, q: torch.Tensor, cut: Cut | None = CUT) -> torch.Tensor:
        return latent_decode(q, self.cache, self.tables, self.lengths, cut=cut, **self.said)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_decode_and_prompts(
    device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int, int]
) -> None:
    """A whole prompt, a chunk behind a context, nothing, across splits; and the last token of each, decoded."""
    heads, *rest = shape
    if dtype == torch.float32 and rest[0] == 512:
        pytest.skip("float32 is for small models alone")
    lengths, sizes = (5, 90, 17, 131), (5, 21, 0, 7) if heads < 64 or not INTERPRETED else (1, 2, 0, 2)
    latents = Latents(device, dtype, lengths, *rest)
    q = latents.queries(sum(sizes), heads)
    prompt = latents.prefill(q, sizes)
    assert prompt.dtype == dtype
    check("attention", prompt, latents.exact(q, sizes))
    rows = latents.bounds(sizes)[1:].long() - 1
    last = q[rows].contiguous()
    decoded = latents.decode(last)
    check("attention", decoded, latents.exact(last, (1,) * len(lengths)))
    for row in (0, 1, 3):
        assert torch.equal(decoded[row], prompt[rows[row]]), row


def test_more_splits_than_are_merged_at_a_time(device: torch.device) -> None:
    heads, *shape = SHAPES[0] if INTERPRETED else SHAPES[-2]
    latents = Latents(device, torch.bfloat16, (5 * CUT.split + 41, 4 * CUT.split), *shape)
    q = latents.queries(2, heads)
    prompt = latents.prefill(q, (1, 1))
    check("attention", prompt, latents.exact(q, (1, 1)))
    assert torch.equal(latents.decode(q), prompt)


REAL = (
    [(torch.float32, 3, 32, 1)]
    if INTERPRETED
    else [(torch.bfloat16, 16, 512, 3), (torch.bfloat16, 128, 512, 3)]
)
"""Dtype, heads, numbers of a latent, whole splits."""


@pytest.mark.parametrize(("dtype", "heads", "rank", "splits"), REAL)
def test_real_splits(device: torch.device, dtype: torch.dtype, heads: int, rank: int, splits: int) -> None:
    """A request that moves is computed again as a prompt: it must go on as if it had stayed."""
    length = splits * latent_attention.LATENT_CUT.split + 3
    latents = Latents(device, dtype, (length, 5), rank, 64 if rank == 512 else 8)
    q = latents.queries(5, heads)
    prompt = latents.prefill(q, (5, 0), None)
    check("attention", prompt, latents.exact(q, (5, 0)))
    for token in range(5):
        latents.lengths[0] = length - 4 + token
        both = torch.stack((q[token], q[0]))
        assert torch.equal(latents.decode(both, None)[0], prompt[token]), token


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_knows_neither_its_batch_nor_its_chunk(
    device: torch.device, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding is among the rows, and gives zeros. What is computed in turns has the same bits."""
    lengths = (40, 0, 150, 7, *[0] * 13)
    latents = Latents(device, dtype, lengths)
    q = latents.queries(len(lengths), 4)
    together = latents.decode(q)
    assert (together[[1, *range(4, 17)]] == 0).all()
    check("attention", together[2:3], latents.exact(q, (1,) * len(lengths))[2:3])
    monkeypatch.setattr(latent_attention, "PARTS_BYTES", 1)
    assert torch.equal(latents.decode(q), together)
    one = Latents(device, dtype, (150,))
    one.cache, one.tables = latents.cache, latents.tables[2:3, :10].contiguous()
    assert torch.equal(one.decode(q[2:3])[0], together[2])
    prompt = one.queries(30, 4)
    whole = one.prefill(prompt, (30,))
    assert torch.equal(one.prefill(prompt[-9:].contiguous(), (9,)), whole[-9:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("heads", "rank", "rope"), [(3, 40, 8), (20, 32, 6)])
def test_latents_are_written(
    device: torch.device, dtype: torch.dtype, interleaved: bool, heads: int, rank: int, rope: int
) -> None:
    made = torch.randn(7, 8 + rank + rope, device=device).to(dtype)[:, 8:]
    q = torch.randn(7, heads, 16 + rope, device=device).to(dtype)[..., 16:]
    norm = torch.rand(rank, device=device).to(dtype)
    angles = torch.rand(50, rope // 2, device=device) * 6
    places = (
        angles.cos(),
        angles.sin(),
        torch.randint(0, 50, (7,), device=device),
        torch.randperm(20, device=device)[:7],
    )
    places[3][2::3] = -1
    caches = [
        torch.full((5, 4, rank + rope), 77.0, dtype=kind, device=device) for kind in (dtype, torch.float64)
    ]
    seen = [
        torch.full((7, heads, rank + rope), 77.0, dtype=kind, device=device)
        for kind in (dtype, torch.float64)
    ]
    latent_write(made, norm, q, *places, caches[0], seen[0], 1e-6, interleaved=interleaved)
    exact = made.double(), norm.double(), q.double()
    plain_kernels.latent_write(*exact, *places, caches[1], seen[1], 1e-6, interleaved=interleaved)
    for got, expected in (caches, seen):
        assert torch.equal(got == 77.0, expected == 77.0)
        check("norm_rope", got, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("inner", "width"), [(16, 33), (70, 12), (128, 64)])
@pytest.mark.parametrize("turned", [False, True])
def test_products_by_head(
    device: torch.device, dtype: torch.dtype, inner: int, width: int, turned: bool
) -> None:
    x = torch.randn(70, 3, inner + 8, device=device).to(dtype)[..., :inner]
    lies = (3, width + 5, inner) if turned else (3, inner + 5, width)
    w = torch.randn(lies, device=device).to(dtype)[:, 5:]
    w = w.transpose(1, 2) if turned else w
    out = torch.full((70, 3, width + 8), 77.0, dtype=dtype, device=device)
    y = by_head(x, w, out[..., :width])
    check("attention", y, plain_kernels.by_head(x.double(), w.double()))
    assert (out[..., width:] == 77.0).all()
    assert torch.equal(by_head(x[41:44], w), y[41:44])
