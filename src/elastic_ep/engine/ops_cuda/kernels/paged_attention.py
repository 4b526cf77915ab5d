"""Attention over a paged KV cache: what decode_attention.py and prefill_attention.py share, so that their bits agree.

A context is cut into splits, a split into blocks of keys, as `CUT` says, whatever the batch. A split is an online
softmax over its blocks (FlashAttention-2); the splits' results are merged one after the other, first to last. Decode
does the splits in parallel and merges them when all are done (flash-decoding); prefill does them in a row and merges as
it goes. What a query may not see adds exact zeros, and the sum of the weights is exact. So a token's result depends on
its query and its context alone: not on its batch, nor on whether it was computed in a prompt of any cutting or one by
one, which is what a request that moves to another rank relies on. Blocks and splits that a window hides from all rows
are left out: their zeros change no bit.

In decode the products are transposed, as in expert_ffn.py (`attend_split`): keys and values are the left operand, the
query rows (tokens times the heads that share a key-value head) the right one, as few as 16. In prefill there are many
rows, which are on the left (`attend_rows`), so that the weights need not go through shared memory. With sides exchanged
the tensor cores add up the same products in the same order; tests/engine/kernels/ compares the bits on the GPU. Block
tables are vLLM's (PagedAttention).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton.language as tl

from elastic_ep.kernel import dot, jit, power_of_2


@dataclass(frozen=True, slots=True)
class Cut:
    """How a context is cut. The bits depend on it: decode and prefill must be given the same."""

    split: int
    """Keys, a multiple of `block`."""
    block: int
    """Keys."""


CUT = {torch.bfloat16: Cut(split=512, block=64), torch.float32: Cut(split=512, block=32)}
"""By dtype."""


def exponent_scale(dim: int, scale: float | None = None) -> float:
    """Of the scores: with it they are exponents of two."""
    return 1.4426950408889634 * float(dim**-0.5 if scale is None else scale)


def part_bytes(heads: int, dim: int, splits: int) -> int:
    """Of a decoded sequence's sums of so many splits, each with its maximum and total, before they are merged."""
    return heads * splits * (power_of_2(dim) + 2) * 4


LOG2_E = tl.constexpr(1.4426950408889634)


@jit
def first_seen(position: tl.tensor, WINDOW: tl.constexpr, CHUNKED: tl.constexpr) -> tl.tensor:
    """The first key that a query at `position` sees (see models.spec.Window); 0 if `WINDOW` is."""
    if WINDOW == 0:
        return position * 0
    if CHUNKED:
        return position // WINDOW * WINDOW
    return tl.maximum(position - WINDOW + 1, 0)


@jit
def pages_of(
    table: tl.tensor, start: tl.tensor, end: tl.tensor, PAGE: tl.constexpr, BLOCK: tl.constexpr
) -> tl.tensor:
    """Page of each key of a block [BLOCK] int32; 0 from `end` on."""
    key = start + tl.arange(0, BLOCK)
    return tl.load(table + key // PAGE, mask=key < end, other=0)


@jit
def attend_split(
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    table: tl.tensor,
    first: tl.tensor,
    end: tl.tensor,
    last_seen: tl.tensor,
    low: tl.tensor,
    scale: tl.tensor,
    page_stride: tl.tensor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    R: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
) -> tl.tensor:
    """Keys first..end for q [BLOCK_D, R], row r up to key `last_seen`[r]: sum [BLOCK_D, R], maximum [R], total [R]. With
    a `WINDOW` from key `low` on.

    `keys` and `values` point to the head's place in page 0. The sum is not yet divided by the total; a row that sees
    none of the keys has sum 0, maximum -inf, total 0.
    """
    lane = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D, R], tl.float32)
    weight = tl.zeros([BLOCK, R], tl.float32)
    top = tl.full([R], -float("inf"), tl.float32)
    # Page numbers are read a block before their keys, which the compiler then takes for loads without a load before
    # them: it keeps more of them in flight.
    page = pages_of(table, first, end, PAGE, BLOCK)
    for start in range(first, end, BLOCK):
        key = start + tl.arange(0, BLOCK)
        exists = key < end
        at = (page.to(tl.int64) * page_stride + key % PAGE * D)[:, None] + lane[None, :]
        real = exists[:, None]
        if D != BLOCK_D:
            real = real & (lane < D)[None, :]
        k = tl.load(keys + at, mask=real, other=0.0)
        v = tl.load(values + at, mask=real, other=0.0)
        page = pages_of(table, start + BLOCK, end, PAGE, BLOCK)
        score = dot(k, q, tl.zeros([BLOCK, R], tl.float32)) * scale
        if WINDOW:
            exists = exists & (key >= low)
        score = tl.where(exists[:, None] & (key[:, None] <= last_seen[None, :]), score, -float("inf"))
        new_top = tl.maximum(top, tl.max(score, axis=0))
        base = tl.where(new_top == -float("inf"), 0.0, new_top)
        fade = tl.exp2(top - base)
        p = tl.exp2(score - base[None, :])
        weight = tl.fma(weight, tl.broadcast_to(fade[None, :], [BLOCK, R]), p)
        acc = dot(tl.trans(v), p.to(v.dtype), acc * fade[None, :])
        top = new_top
    return acc, top, exact_sum(weight, 0)


@jit
def exact_sum(weight: tl.tensor, AXIS: tl.constexpr) -> tl.tensor:
    """Over one axis, in integers: the same whatever the order, hence whatever the layout. 0 <= weight < 2 ** 31."""
    return tl.sum((weight * 4294967296.0).to(tl.int64), axis=AXIS).to(tl.float32) * 2.3283064365386963e-10


@jit
def attend_rows(
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    table: tl.tensor,
    first: tl.tensor,
    end: tl.tensor,
    last_seen: tl.tensor,
    low: tl.tensor,
    scale: tl.tensor,
    page_stride: tl.tensor,
    acc: tl.tensor,
    weight: tl.tensor,
    top: tl.tensor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    R: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    ALL_SEEN: tl.constexpr,
) -> tl.tensor:
    """Goes on with keys first..end, many rows of queries on the left: q and acc [R, BLOCK_D], weight [R, BLOCK], top [R].

    With `ALL_SEEN` there are whole blocks, of which every row sees every key; else row r sees those up to `last_seen`[r],
    and with a `WINDOW` from `low`[r] on. The numbers are those of `attend_split`:
    products with sides exchanged, sums in the same order.
    """
    lane = tl.arange(0, BLOCK_D)
    page = pages_of(table, first, end, PAGE, BLOCK)
    for start in range(first, end, BLOCK):
        key = start + tl.arange(0, BLOCK)
        exists = key < end
        at = (page.to(tl.int64) * page_stride + key % PAGE * D)[:, None] + lane[None, :]
        if ALL_SEEN and D == BLOCK_D:
            k = tl.load(keys + at)
            v = tl.load(values + at)
        else:
            real = exists[:, None] & (lane < D)[None, :]
            k = tl.load(keys + at, mask=real, other=0.0)
            v = tl.load(values + at, mask=real, other=0.0)
        page = pages_of(table, start + BLOCK, end, PAGE, BLOCK)
        score = dot(q, tl.trans(k), tl.zeros([R, BLOCK], tl.float32)) * scale
        if not ALL_SEEN:
            seen = exists[None, :] & (key[None, :] <= last_seen[:, None])
            if WINDOW:
                seen = seen & (key[None, :] >= low[:, None])
            score = tl.where(seen, score, -float("inf"))
        new_top = tl.maximum(top, tl.max(score, axis=1))
        base = tl.where(new_top == -float("inf"), 0.0, new_top)
        fade = tl.exp2(top - base)
        p = tl.exp2(score - base[:, None])
        weight = tl.fma(weight, tl.broadcast_to(fade[:, None], [R, BLOCK]), p)
        acc = dot(p.to(v.dtype), v, acc * fade[:, None])
        top = new_top
    return acc, weight, top


@jit
def merge(
    acc: tl.tensor,
    top: tl.tensor,
    total: tl.tensor,
    new_acc: tl.tensor,
    new_top: tl.tensor,
    new_total: tl.tensor,
) -> tl.tensor:
    """Two results of `attend_split` as one; acc [BLOCK_D, R] or, for one row, all [BLOCK_D]."""
    both = tl.maximum(top, new_top)
    base = tl.where(both == -float("inf"), 0.0, both)
    fade = tl.exp2(top - base)
    new_fade = tl.exp2(new_top - base)
    total = tl.fma(total, fade, new_total * new_fade)
    acc = tl.fma(acc, tl.broadcast_to(fade, acc.shape), new_acc * tl.broadcast_to(new_fade, acc.shape))
    return acc, both, total
