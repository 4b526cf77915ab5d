"""Chunked prefill: the newest tokens of each sequence, in tiles of one sequence's tokens.

Which tiles there are follows from `cu_seqlens` on the device; the launch covers the most that there can be. A sequence of
one new token is left to decode, which gives the same bits: in a tile it would cost what many tokens do.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from elastic_ep.engine.ops_cuda.kernels.decode_attention import decode_ones
from elastic_ep.engine.ops_cuda.kernels.paged_attention import (
    CUT,
    LOG2_E,
    Cut,
    attend_rows,
    exact_sum,
    exponent_scale,
    first_seen,
    merge,
)
from elastic_ep.kernel import jit, power_of_2
from elastic_ep.models.spec import Window

_ROWS = {torch.bfloat16: 128, torch.float32: 16}
"""Of a tile: tokens times the heads that share a key-value head. Two sums of that many rows must fit the registers."""


@jit
def _prefill_kernel(
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    tables: tl.tensor,
    bounds: tl.tensor,
    lengths: tl.tensor,
    out: tl.tensor,
    sinks: tl.tensor,
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
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_B: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNKED: tl.constexpr,
    SINKS: tl.constexpr,
) -> None:
    head = tl.program_id(0)
    tile = tl.num_programs(1) - 1 - tl.program_id(1)  # those with the longest contexts first
    sequence = tl.arange(0, BLOCK_B)
    known = sequence < sequences
    begin = tl.load(bounds + sequence, mask=known, other=0).to(tl.int32)
    size = tl.load(bounds + sequence + 1, mask=known, other=0).to(tl.int32) - begin
    tiles = tl.where(size == 1, 0, (size + TOKENS - 1) // TOKENS)
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
        query = tl.load(q + at, mask=mask, other=0.0)
        last_seen = tl.where(real, position, -1)
        low = first_seen(position, WINDOW, CHUNKED)

        acc = tl.zeros([R, BLOCK_D], tl.float32)
        top = tl.full([R, 1], -float("inf"), tl.float32)
        total = tl.zeros([R, 1], tl.float32)
        seen = length - tokens + tl.minimum(offset + TOKENS, tokens)
        seen_by_all = (length - tokens + offset + 1) // BLOCK * BLOCK
        head_keys = keys + head.to(tl.int64) * (PAGE * D)
        head_values = values + head.to(tl.int64) * (PAGE * D)
        table = tables + mine.to(tl.int64) * table_stride
        lowest = first_seen(length - tokens + offset, WINDOW, CHUNKED)  # of the tile's first token
        for first in range(lowest // SPLIT * SPLIT, seen, SPLIT):
            stop = tl.minimum(first + SPLIT, seen)
            if WINDOW:
                middle = tl.maximum(first, lowest // BLOCK * BLOCK)
            else:
                middle = tl.minimum(tl.maximum(seen_by_all, first), stop)
            new_acc = tl.zeros([R, BLOCK_D], tl.float32)
            weight = tl.zeros([R, BLOCK], tl.float32)
            new_top = tl.full([R], -float("inf"), tl.float32)
            if WINDOW == 0:
                new_acc, weight, new_top = attend_rows(
                    query, head_keys, head_values, table, first, middle, last_seen, low, scale, HK * PAGE * D,
                    new_acc, weight, new_top, D, BLOCK_D, R, PAGE, BLOCK, WINDOW, True,
                )  # fmt: skip
            new_acc, weight, new_top = attend_rows(
                query, head_keys, head_values, table, middle, stop, last_seen, low, scale, HK * PAGE * D,
                new_acc, weight, new_top, D, BLOCK_D, R, PAGE, BLOCK, WINDOW, False,
            )  # fmt: skip
            new_total = exact_sum(weight, 1)
            acc, top, total = merge(acc, top, total, new_acc, new_top[:, None], new_total[:, None])
        if SINKS:
            sink = tl.load(sinks + head * G + row % G).to(tl.float32)[:, None] * LOG2_E
            nothing = tl.zeros([R, BLOCK_D], tl.float32)
            acc, top, total = merge(acc, top, total, nothing, sink, tl.full([R, 1], 1.0, tl.float32))
        result = tl.where(total == 0, 0.0, acc / tl.where(total == 0, 1.0, total))
        tl.store(out + at, result.to(out.dtype.element_ty), mask=mask)


def prefill_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block_tables: torch.Tensor,
    cu_seqlens: torch.Tensor,
    context_lens: torch.Tensor,
    *,
    scale: float | None = None,
    window: Window | None = None,
    sinks: torch.Tensor | None = None,
    cut: Cut | None = None,
) -> torch.Tensor:
    """The last tokens of each sequence, each seeing its context up to itself: [T, Hq, D] like q.

    `q` [T, Hq, D], contiguous: sequence b has rows `cu_seqlens`[b] to `cu_seqlens`[b + 1], none or more, and they are
    the last of its `context_lens`[b] tokens, whose keys and values are all in the cache. Both int32 or int64, [B + 1]
    and [B], B at most 1024. Rows beyond the last sequence are undefined. The rest, `scale`,
    `sinks`, `cut` and errors, as in `decode_attention`.
    """
    tokens, heads, dim = q.shape
    _, kv_heads, page, _ = keys.shape
    sequences = len(context_lens)
    out = torch.empty_like(q)
    if not tokens or not sequences:
        return out
    group, cut = heads // kv_heads, cut or CUT[q.dtype]
    rows = max(power_of_2(group), _ROWS[q.dtype])
    per_tile = rows // group
    _prefill_kernel[(kv_heads, triton.cdiv(tokens, per_tile) + sequences)](
        q,
        keys,
        values,
        block_tables,
        cu_seqlens,
        context_lens,
        out,
        q if sinks is None else sinks,
        exponent_scale(dim, scale),
        block_tables.stride(0),
        sequences,
        HK=kv_heads,
        G=group,
        D=dim,
        BLOCK_D=max(power_of_2(dim), 16),
        R=rows,
        TOKENS=per_tile,
        PAGE=page,
        SPLIT=cut.split,
        BLOCK=cut.block,
        BLOCK_B=power_of_2(sequences),
        WINDOW=window.size if window else 0,
        CHUNKED=window is not None and window.chunked,
        SINKS=sinks is not None,
        num_warps=8 if q.dtype == torch.bfloat16 else 4,
        num_stages=3 if q.dtype == torch.bfloat16 else 2,
        enable_fp_fusion=False,
    )
    decode_ones(
        q,
        keys,
        values,
        block_tables,
        cu_seqlens,
        context_lens,
        out,
        scale=scale,
        window=window,
        sinks=sinks,
        cut=cut,
    )
    return out
