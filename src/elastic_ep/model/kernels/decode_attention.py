"""Decode: one query a sequence, its context split over many programs, whose results a second kernel merges.

The split is flash-decoding's; its size is fixed, so that a sequence's bits do not depend on the batch.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from elastic_ep.model.kernels.launch import jit, power_of_2
from elastic_ep.model.kernels.paged_attention import BLOCK, SPLIT, attend_split, exponent_scale, merge


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
        acc, top, total = attend_split(
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
        acc, top, total = merge(acc, top, total, new_acc, new_top, new_total)
    result = tl.where(total == 0, 0.0, acc / tl.where(total == 0, 1.0, total))
    tl.store(out + at * D + lane, result.to(out.dtype.element_ty), mask=lane < D)


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
    group, block_d = heads // kv_heads, max(power_of_2(dim), 16)
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
        exponent_scale(dim),
        block_tables.stride(0),
        splits,
        HK=kv_heads,
        G=group,
        D=dim,
        BLOCK_D=block_d,
        R=max(power_of_2(group), 16),
        PAGE=page,
        BLOCK=BLOCK[q.dtype],
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
