from __future__ import annotations

from typing import Any

import pytest
import torch

from elastic_ep.engine.ops_cuda.kernels.decode_attention import DecodePlan, decode_attention
from elastic_ep.engine.ops_cuda.kernels.paged_attention import CUT, Cut
from elastic_ep.engine.ops_cuda.kernels.prefill_attention import prefill_attention
from elastic_ep.kernel import COUNTERS
from elastic_ep.models.spec import Window
from tests.engine.kernels.conftest import INTERPRETED
from tests.engine.kernels.errors import check
from tests.kit import plain_kernels

DTYPES = [torch.bfloat16, torch.float32]
LONG = max(cut.split for cut in CUT.values()) + 9
"""More than one split."""


class Cache:
    """Random keys and values of sequences of `lengths` tokens, pages strewn; what no sequence owns is NaN."""

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        lengths: tuple[int, ...],
        kv_heads: int = 2,
        dim: int = 32,
        page: int = 16,
    ) -> None:
        counts = [-(-length // page) for length in lengths]
        total = sum(counts) + 2
        owned = torch.randperm(total)
        shape = total, kv_heads, page, dim
        self.keys, self.values = (torch.full(shape, torch.nan, dtype=dtype, device=device) for _ in range(2))
        self.lengths = torch.tensor(lengths, dtype=torch.int32, device=device)
        self.tables = torch.full((len(lengths), max(counts) + 3), total - 1, dtype=torch.int32, device=device)
        for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
            mine, owned = owned[:count], owned[count:]
            self.tables[row, :count] = mine.to(device)
            for cache in (self.keys, self.values):
                fresh = torch.randn(count, page, kv_heads, dim, device=device).to(dtype).flatten(0, 1)
                fresh[length:] = torch.nan
                cache[mine.to(device)] = fresh.view(count, page, kv_heads, dim).transpose(1, 2)

    def bounds(self, sizes: tuple[int, ...]) -> torch.Tensor:
        device = self.keys.device
        return torch.tensor((0, *sizes), device=device).cumsum(0).to(torch.int32)

    def exact(self, q: torch.Tensor, sizes: tuple[int, ...], **more: Any) -> torch.Tensor:
        keys, values = self.keys.double(), self.values.double()
        return plain_kernels.paged_attention(
            q.double(), keys, values, self.tables, self.bounds(sizes), self.lengths, **more
        )

    def prefill(self, q: torch.Tensor, sizes: tuple[int, ...], **more: Any) -> torch.Tensor:
        bounds = self.bounds(sizes)
        return prefill_attention(q, self.keys, self.values, self.tables, bounds, self.lengths, **more)

    def decode(self, q: torch.Tensor, **more: Any) -> torch.Tensor:
        return decode_attention(q, self.keys, self.values, self.tables, self.lengths, **more)


def queries(cache: Cache, tokens: int, heads: int) -> torch.Tensor:
    shape = tokens, heads, cache.keys.shape[-1]
    # Three times the usual size: the softmax then has to choose.
    return 3 * torch.randn(shape, device=cache.keys.device).to(cache.keys.dtype)


SHAPES = [(4, 2, 32, 16), (8, 1, 128, 16), (3, 3, 40, 8), (6, 2, 96, 32), (20, 1, 64, 16)]
"""Query heads, key-value heads, head dim, page size."""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_decode(device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    heads, *rest = shape
    lengths = (1, 16, 77, LONG)
    cache = Cache(device, dtype, lengths, *rest)
    q = queries(cache, len(lengths), heads)
    out = cache.decode(q)
    assert out.dtype == dtype
    check("attention", out, cache.exact(q, (1,) * len(lengths)))


def test_more_sequences_than_there_are_counters_are_refused(device: torch.device) -> None:
    q = torch.zeros(COUNTERS + 1, 1, 16, device=device)
    cache = torch.zeros(1, 1, 16, 16, device=device)
    tables = torch.zeros(len(q), 1, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="more than"):
        decode_attention(q, cache, cache, tables, tables[:, 0])


PLANS = [
    DecodePlan(),
    DecodePlan(stages=5),
    DecodePlan(warps=8, stages=2),
]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cut", [Cut(split=64, block=32), Cut(split=128, block=128)])
def test_every_plan_of_decode_is_right_and_repeatable(
    device: torch.device, dtype: torch.dtype, cut: Cut
) -> None:
    lengths = (1, 0, 64, 300)
    cache = Cache(device, dtype, lengths)
    q = queries(cache, len(lengths), 6)
    exact = cache.exact(q, (1,) * len(lengths))
    for plan in PLANS:
        out = cache.decode(q, cut=cut, plan=plan)
        check("attention", out, exact)
        # A plan that counts must leave its counters as it found them.
        assert torch.equal(cache.decode(q, cut=cut, plan=plan), out)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_prefill(device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int, int]) -> None:
    heads, *rest = shape
    lengths, sizes = (
        (5, 90, 17, LONG, LONG, 1),
        (5, 21, 0, 3, 1, 1),
    )  # whole prompt, chunk behind a context, nothing, across splits, one token beside them, and nothing before it
    cache = Cache(device, dtype, lengths, *rest)
    q = queries(cache, sum(sizes), heads)
    check("attention", cache.prefill(q, sizes), cache.exact(q, sizes))


WINDOWS = [
    (None, True),
    (Window(5), False),
    (Window(130), True),
    (Window(64, chunked=True), False),
    (Window(200, chunked=True), True),
]
"""And whether there are sinks."""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("window", "sunk"), WINDOWS)
def test_windows_and_sinks(
    device: torch.device, dtype: torch.dtype, window: Window | None, sunk: bool
) -> None:
    """What is out of sight begins within blocks and splits, and at their ends; decode goes on where prefill ends."""
    if INTERPRETED and dtype == torch.bfloat16 and window != Window(130):
        pytest.skip("slow in the interpreter")
    lengths, sizes = (3, 133, LONG), (3, 9, 40)
    cache = Cache(device, dtype, lengths)
    more = {"window": window, "sinks": torch.randn(6, device=device).to(dtype) * 3 if sunk else None}
    q = queries(cache, sum(sizes), 6)
    prompt = cache.prefill(q, sizes, **more)
    check("attention", prompt, cache.exact(q, sizes, **more))
    last = cache.bounds(sizes)[1:].long() - 1
    assert torch.equal(cache.decode(q[last], **more), prompt[last])


def test_padding_of_a_decode_batch_is_zero(device: torch.device) -> None:
    cache = Cache(device, torch.float32, (9, 0, 33))
    out = cache.decode(queries(cache, 3, 4))
    assert (out[1] == 0).all()
    assert (out[[0, 2]] != 0).all()


def test_rows_beyond_the_last_sequence_are_left_alone(device: torch.device) -> None:
    cache = Cache(device, torch.float32, (9, 20))
    q = queries(cache, 13, 4)
    sizes = (3, 2)
    check("attention", cache.prefill(q, sizes)[:5], cache.exact(q, sizes)[:5])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sequence_does_not_know_its_batch(device: torch.device, dtype: torch.dtype) -> None:
    lengths = (40, LONG, 7)
    cache = Cache(device, dtype, lengths)
    q = queries(cache, 3, 4)
    together = cache.decode(q)
    for row, length in enumerate(lengths):
        pages = -(-length // 16)
        alone = decode_attention(
            q[row : row + 1],
            cache.keys,
            cache.values,
            cache.tables[row : row + 1, :pages],
            cache.lengths[row : row + 1],
        )
        assert torch.equal(alone[0], together[row])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_does_not_know_its_chunk(device: torch.device, dtype: torch.dtype) -> None:
    """The same prompt in one piece and in two, its tokens in other places of other tiles."""
    length, tail = 70, 23
    cache = Cache(device, dtype, (length,))
    q = queries(cache, length, 4)
    whole = cache.prefill(q, (length,))
    assert torch.equal(cache.prefill(q[-tail:], (tail,)), whole[-tail:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize("length", [1, 64, 200, LONG, 3 * LONG])
def test_decode_gives_the_bits_of_prefill(
    device: torch.device, dtype: torch.dtype, dim: int, length: int
) -> None:
    """A request that moves is computed again as a prompt: it must go on as if it had stayed."""
    if device.type == "cpu" and (length, dim) not in ((1, 32), (200, 64), (LONG, 32)):
        pytest.skip("slow in the interpreter")
    cache = Cache(device, dtype, (length,), dim=dim)
    size = min(length, 3 if device.type == "cpu" else 11)
    q = queries(cache, size, 8)
    exact = cache.exact(q, (size,))
    prompt = cache.prefill(q, (size,))
    check("attention", prompt, exact)
    for token in range(size):
        cache.lengths[0] = length - size + token + 1
        one = cache.decode(q[token : token + 1])
        assert torch.equal(one[0], prompt[token])
