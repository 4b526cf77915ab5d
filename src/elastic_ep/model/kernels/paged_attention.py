"""Attention over a paged KV cache: decode, split over the context, and chunked prefill; the bits of both agree.

A context is cut into splits of `SPLIT` keys, a split into blocks of 64 keys
(32 of float32), whatever the batch. A split is an
online softmax over its blocks (FlashAttention-2); the splits' results are merged one after the other, first to last.
Decode does the splits in parallel and merges them in a second kernel (flash-decoding); prefill does them in a row and
merges as it goes. Both go through the same two functions, `_attend_split` and `_merge`, and what a query may not see
adds exact zeros. So a token's result depends on its query and its context alone: not on its batch, nor on whether it
was computed in a prompt of any cutting or one by one, which is what a request that moves to another rank relies on.

The products are transposed, as in expert_ffn.py: keys and values are the left operand, the query rows (tokens times
the heads that share a key-value head) the right one, as few as 16. Block tables are vLLM's (PagedAttention).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from elastic_ep.model.kernels.launch import dot, jit, power_of_2

SPLIT = tl.constexpr(512)
"""Keys. A multiple of every block."""
_LOG2_E = 1.4426950408889634


@jit
def _attend_split(
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    table: tl.tensor,
    first: tl.tensor,
    end: tl.tensor,
    last_seen: tl.tensor,
    scale: tl.tensor,
    page_stride: tl.tensor,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    R: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Keys first..end for q [BLOCK_D, R], row r up to key `last_seen`[r]: sum [BLOCK_D, R], maximum [R], total [R].

    `keys` and `values` point to the head's place in page 0. The sum is not yet divided by the total; a row that sees
    none of the keys has sum 0, maximum -inf, total 0.
    """
    lane = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D, R], tl.float32)
    weight = tl.zeros([BLOCK, R], tl.float32)
    top = tl.full([R], -float("inf"), tl.float32)
    for start in range(first, end, BLOCK):
        key = start + tl.arange(0, BLOCK)
        exists = key < end
        page = tl.load(table + key // PAGE, mask=exists, other=0).to(tl.int64)
        at = (page * page_stride + key % PAGE * D)[:, None] + lane[None, :]
        real = exists[:, None]
        if D != BLOCK_D:
            real = real & (lane < D)[None, :]
        k = tl.load(keys + at, mask=real, other=0.0)
        v = tl.load(values + at, mask=real, other=0.0)
        score = dot(k, q, tl.zeros([BLOCK, R], tl.float32)) * scale
        score = tl.where(exists[:, None] & (key[:, None] <= last_seen[None, :]), score, -float("inf"))
        new_top = tl.maximum(top, tl.max(score, axis=0))
        base = tl.where(new_top == -float("inf"), 0.0, new_top)
        fade = tl.exp2(top - base)
        p = tl.exp2(score - base[None, :])
        weight = tl.fma(weight, tl.broadcast_to(fade[None, :], [BLOCK, R]), p)
        acc = dot(tl.trans(v), p.to(v.dtype), acc * fade[None, :])
        top = new_top
    return acc, top, tl.sum(weight, axis=0)


@jit
def _merge(
    acc: tl.tensor,
    top: tl.tensor,
    total: tl.tensor,
    new_acc: tl.tensor,
    new_top: tl.tensor,
    new_total: tl.tensor,
) -> tl.tensor:
    """Two results of `_attend_split` as one; acc [BLOCK_D, R] or, for one row, all [BLOCK_D]."""
    both = tl.maximum(top, new_top)
    base = tl.where(both == -float("inf"), 0.0, both)
    fade = tl.exp2(top - base)
    new_fade = tl.exp2(new_top - base)
    total = tl.fma(total, fade, new_total * new_fade)
    acc = tl.fma(acc, tl.broadcast_to(fade, acc.shape), new_acc * tl.broadcast_to(new_fade, acc.shape))
    return acc, both, total


@jit
def _decode_kernel(
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    tables: tl.tensor,
    lengths: tl.tensor,
    parts: tl.tensor,
    tops: tl.tensor,
    totals: tl.tensor,
    scale: tl.tensor,
    table_stride: tl.tensor,
    splits: tl.tensor,
    HK: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    R: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    head = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)  # slowest: the programs that find nothing to do come last
    length = tl.load(lengths + row).to(tl.int32)
    first = split * SPLIT
    if first < length:
        lane = tl.arange(0, BLOCK_D)
        group = tl.arange(0, R)
        query_head = head * G + group
        q_at = q + (row * (HK * G) + query_head)[:, None] * D + lane[None, :]
        mask = (group < G)[:, None] & (lane < D)[None, :]
        query = tl.trans(tl.load(q_at, mask=mask, other=0.0))
        acc, top, total = _attend_split(
            query,
            keys + head.to(tl.int64) * (PAGE * D),
            values + head.to(tl.int64) * (PAGE * D),
            tables + row * table_stride,
            first,
            tl.minimum(first + SPLIT, length),
            tl.zeros([R], tl.int32) + length,
            scale,
            HK * PAGE * D,
            D,
            BLOCK_D,
            R,
            PAGE,
            BLOCK,
        )
        out = (row * (HK * G) + query_head) * splits + split
        tl.store(parts + out[:, None] * BLOCK_D + lane[None, :], tl.trans(acc), mask=(group < G)[:, None])
        tl.store(tops + out, top, mask=group < G)
        tl.store(totals + out, total, mask=group < G)


@jit
def _reduce_kernel(
    parts: tl.tensor,
    tops: tl.tensor,
    totals: tl.tensor,
    lengths: tl.tensor,
    out: tl.tensor,
    splits: tl.tensor,
    HQ: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    row = tl.program_id(1).to(tl.int64)
    at = row * HQ + tl.program_id(0)
    lane = tl.arange(0, BLOCK_D)
    length = tl.load(lengths + row).to(tl.int32)
    acc = tl.zeros([BLOCK_D], tl.float32)
    top = tl.full(
        [BLOCK_D], -float("inf"), tl.float32
    )  # one value, as wide as acc: loads then pipeline alike
    total = tl.zeros([BLOCK_D], tl.float32)
    for split in tl.range(0, tl.cdiv(length, SPLIT), num_stages=4):
        part = at * splits + split
        new_acc = tl.load(parts + part * BLOCK_D + lane)
        new_top = tl.load(tops + part + 0 * lane)
        new_total = tl.load(totals + part + 0 * lane)
        acc, top, total = _merge(acc, top, total, new_acc, new_top, new_total)
    result = tl.where(total == 0, 0.0, acc / tl.where(total == 0, 1.0, total))
    tl.store(out + at * D + lane, result.to(out.dtype.element_ty), mask=lane < D)


@jit
def _prefill_kernel(
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    tables: tl.tensor,
    bounds: tl.tensor,
    lengths: tl.tensor,
    out: tl.tensor,
    scale: tl.tensor,
    table_stride: tl.tensor,
    sequences: tl.tensor,
    HK: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    R: tl.constexpr,
    TOKENS: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_B: tl.constexpr,
) -> None:
    head = tl.program_id(0)
    tile = tl.program_id(1)
    sequence = tl.arange(0, BLOCK_B)
    known = sequence < sequences
    begin = tl.load(bounds + sequence, mask=known, other=0).to(tl.int32)
    size = tl.load(bounds + sequence + 1, mask=known, other=0).to(tl.int32) - begin
    tiles = (size + TOKENS - 1) // TOKENS
    end = tl.cumsum(tiles, axis=0)
    mine = tl.sum((end <= tile).to(tl.int32), axis=0)
    here = sequence == mine
    if mine < sequences:
        offset = (tile - tl.sum(tl.where(here, end - tiles, 0), axis=0)) * TOKENS
        begin_token = tl.sum(tl.where(here, begin, 0), axis=0)
        tokens = tl.sum(tl.where(here, size, 0), axis=0)
        length = tl.load(lengths + mine).to(tl.int32)

        lane = tl.arange(0, BLOCK_D)
        row = tl.arange(0, R)
        token = offset + row // G
        real = (row < TOKENS * G) & (token < tokens)
        position = length - tokens + token
        q_row = (begin_token + token).to(tl.int64) * (HK * G) + head * G + row % G
        at = q_row[:, None] * D + lane[None, :]
        mask = real[:, None] & (lane < D)[None, :]
        query = tl.trans(tl.load(q + at, mask=mask, other=0.0))
        last_seen = tl.where(real, position, -1)

        acc = tl.zeros([BLOCK_D, R], tl.float32)
        top = tl.full([1, R], -float("inf"), tl.float32)
        total = tl.zeros([1, R], tl.float32)
        seen = length - tokens + tl.minimum(offset + TOKENS, tokens)
        for first in range(0, seen, SPLIT):
            new_acc, new_top, new_total = _attend_split(
                query,
                keys + head.to(tl.int64) * (PAGE * D),
                values + head.to(tl.int64) * (PAGE * D),
                tables + mine.to(tl.int64) * table_stride,
                first,
                tl.minimum(first + SPLIT, seen),
                last_seen,
                scale,
                HK * PAGE * D,
                D,
                BLOCK_D,
                R,
                PAGE,
                BLOCK,
            )
            acc, top, total = _merge(acc, top, total, new_acc, new_top[None, :], new_total[None, :])
        result = tl.where(total == 0, 0.0, acc / tl.where(total == 0, 1.0, total))
        tl.store(out + at, tl.trans(result.to(out.dtype.element_ty)), mask=mask)


class _Cut(NamedTuple):
    """How the work is cut. `keys` decides bits, the rest speed alone."""

    keys: int
    """Of a block."""
    rows: int
    """Of a prefill tile: tokens times the heads that share a key-value head."""
    warps: int
    """Of a prefill tile."""


# The sums and the last split's both stay in registers, hence no more rows; float32 has no tensor core to go to.
_CUTS = {torch.bfloat16: _Cut(keys=64, rows=64, warps=8), torch.float32: _Cut(keys=32, rows=16, warps=4)}


def _scale(dim: int) -> float:
    """Of the scores, which are exponents of two."""
    return float(dim**-0.5 * _LOG2_E)


def decode_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    *,
    stages: int = 3,
) -> torch.Tensor:
    """One token a sequence, the last of its context: [B, Hq, D] like q.

    `q` [B, Hq, D], contiguous. `keys` and `values` [pages, Hk, page size, D], contiguous: the keys that one program
    reads for its head then lie page by page in one piece. Hk divides Hq. `block_tables` [B, most pages] int32, rows
    of any stride: page numbers, needed up to the context alone. `context_lens` [B] int32 or int64, the token itself
    included; 0 is padding and gives zeros.

    The launch grows with `most pages`: a table cut to what the longest context may need saves empty programs.
    `stages` of loads in flight: speed alone.
    """
    sequences, heads, dim = q.shape
    _, kv_heads, page, _ = keys.shape
    out = torch.empty_like(q)
    if not sequences:
        return out
    group, block_d, cut = heads // kv_heads, max(power_of_2(dim), 16), _CUTS[q.dtype]
    splits = triton.cdiv(block_tables.shape[1] * page, SPLIT.value)
    parts = q.new_empty(sequences, heads, splits, block_d, dtype=torch.float32)
    tops = q.new_empty(sequences, heads, splits, dtype=torch.float32)
    totals = torch.empty_like(tops)
    _decode_kernel[(kv_heads, sequences, splits)](
        q,
        keys,
        values,
        block_tables,
        context_lens,
        parts,
        tops,
        totals,
        _scale(dim),
        block_tables.stride(0),
        splits,
        HK=kv_heads,
        G=group,
        D=dim,
        BLOCK_D=block_d,
        R=max(power_of_2(group), 16),
        PAGE=page,
        BLOCK=cut.keys,
        num_warps=4,
        num_stages=stages,
        enable_fp_fusion=False,
    )
    _reduce_kernel[(heads, sequences)](
        parts,
        tops,
        totals,
        context_lens,
        out,
        splits,
        HQ=heads,
        D=dim,
        BLOCK_D=block_d,
        num_warps=1,
        enable_fp_fusion=False,
    )
    return out


def prefill_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block_tables: torch.Tensor,
    cu_seqlens: torch.Tensor,
    context_lens: torch.Tensor,
) -> torch.Tensor:
    """The last tokens of each sequence, each seeing its context up to itself: [T, Hq, D] like q.

    `q` [T, Hq, D], contiguous: sequence b has rows `cu_seqlens`[b] to `cu_seqlens`[b + 1], none or more, and they are
    the last of its `context_lens`[b] tokens, whose keys and values are all in the cache. Both int32 or int64, [B + 1]
    and [B], B at most 1024. Rows beyond the last sequence are undefined. The rest as in `decode_attention`.
    """
    tokens, heads, dim = q.shape
    _, kv_heads, page, _ = keys.shape
    sequences = len(context_lens)
    out = torch.empty_like(q)
    if not tokens or not sequences:
        return out
    group, cut = heads // kv_heads, _CUTS[q.dtype]
    rows = max(power_of_2(group), cut.rows)
    per_tile = rows // group
    _prefill_kernel[(kv_heads, triton.cdiv(tokens, per_tile) + sequences)](
        q,
        keys,
        values,
        block_tables,
        cu_seqlens,
        context_lens,
        out,
        _scale(dim),
        block_tables.stride(0),
        sequences,
        HK=kv_heads,
        G=group,
        D=dim,
        BLOCK_D=max(power_of_2(dim), 16),
        R=rows,
        TOKENS=per_tile,
        PAGE=page,
        BLOCK=cut.keys,
        BLOCK_B=power_of_2(sequences),
        num_warps=cut.warps,
        num_stages=2,
        enable_fp_fusion=False,
    )
    return out
