"""Decode: one query a sequence, its context split over many programs, whose results are merged first to last.

The split is flash-decoding's; its size is fixed, so that a sequence's bits do not depend on the batch. As in stream-K's
products, the program that happens to end last merges: it adds up the same numbers in the same order, so the bits do not
tell who did it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from elastic_ep.engine.ops_cuda.kernels.paged_attention import (
    CUT,
    LOG2_E,
    Cut,
    attend_split,
    exponent_scale,
    first_seen,
    merge,
)
from elastic_ep.kernel import COUNTERS, counters, jit, power_of_2
from elastic_ep.models.spec import Window


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """The same for every batch: on a device, other `warps` add up in another order, and give other bits."""

    warps: int = 4
    stages: int = 3
    """Of the loop over blocks."""
    programs: int = 1024
    """For all sequences and heads, about: more share the contexts no better. Results do not depend on it."""


@jit
def _decode_kernel(
    q: tl.tensor,
    keys: tl.tensor,
    values: tl.tensor,
    tables: tl.tensor,
    bounds: tl.tensor,
    lengths: tl.tensor,
    parts: tl.tensor,
    tops: tl.tensor,
    totals: tl.tensor,
    out: tl.tensor,
    sinks: tl.tensor,
    ended: tl.tensor,
    scale: tl.tensor,
    table_stride: tl.tensor,
    splits: tl.tensor,
    HK: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    R: tl.constexpr,
    PAGE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    WINDOW: tl.constexpr,
    CHUNKED: tl.constexpr,
    SINKS: tl.constexpr,
    ONES: tl.constexpr,
) -> None:
    head = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    length = tl.load(lengths + row).to(tl.int32)
    place = row
    if ONES:
        place = tl.load(bounds + row).to(tl.int64)
        length = tl.where(tl.load(bounds + row + 1).to(tl.int64) == place + 1, length, 0)
    low = first_seen(tl.maximum(length - 1, 0), WINDOW, CHUNKED)
    count = tl.cdiv(length, SPLIT)
    begin = low // SPLIT
    lane = tl.arange(0, BLOCK_D)
    group = tl.arange(0, R)
    query = row * (HK * G) + head * G + group
    at_query = (place * (HK * G) + head * G + group)[:, None] * D + lane[None, :]
    mask = (group < G)[:, None] & (lane < D)[None, :]
    for split in range(begin + tl.program_id(2), count, tl.num_programs(2)):
        first = split * SPLIT
        acc, top, total = attend_split(
            tl.trans(tl.load(q + at_query, mask=mask, other=0.0)),
            keys + head.to(tl.int64) * (PAGE * D),
            values + head.to(tl.int64) * (PAGE * D),
            tables + row * table_stride,
            tl.maximum(first, low // BLOCK * BLOCK),
            tl.minimum(first + SPLIT, length),
            tl.zeros([R], tl.int32) + length,
            low,
            scale,
            HK * PAGE * D,
            D,
            BLOCK_D,
            R,
            PAGE,
            BLOCK,
            WINDOW,
        )
        at = query * splits + split
        tl.store(parts + at[:, None] * BLOCK_D + lane[None, :], tl.trans(acc), mask=(group < G)[:, None])
        tl.store(tops + at, top, mask=group < G)
        tl.store(totals + at, total, mask=group < G)
        tl.debug_barrier()  # the stores of all threads come before the one that counts them
        if tl.atomic_add(ended + row * HK + head, 1) == count - begin - 1:
            sink_at = sinks + head * G + group
            _merge_group(
                parts,
                tops,
                totals,
                out + at_query,
                query,
                sink_at,
                splits,
                begin,
                count,
                G,
                D,
                BLOCK_D,
                R,
                SINKS,
            )
            tl.store(ended + row * HK + head, 0)
    if not ONES:
        padding = (length == 0) & (tl.program_id(2) == 0)
        if padding:
            tl.store(out + at_query, tl.zeros([R, BLOCK_D], q.dtype.element_ty), mask=mask)


@jit
def _merge_group(
    parts: tl.tensor,
    tops: tl.tensor,
    totals: tl.tensor,
    out: tl.tensor,
    query: tl.tensor,
    sink_at: tl.tensor,
    splits: tl.tensor,
    begin: tl.tensor,
    count: tl.tensor,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    R: tl.constexpr,
    SINKS: tl.constexpr,
) -> None:
    """The first G of the rows `query` [R] from the splits `begin` to `count`, each of which some program has stored, to
    `out` [R, BLOCK_D], the place of each number."""
    lane = tl.arange(0, BLOCK_D)
    real = (tl.arange(0, R) < G)[:, None]
    acc = tl.zeros([R, BLOCK_D], tl.float32)
    top = tl.full([R, 1], -float("inf"), tl.float32)
    total = tl.zeros([R, 1], tl.float32)
    for split in tl.range(begin, count, num_stages=3):
        at = (query * splits + split)[:, None]
        new_acc = tl.load(parts + at * BLOCK_D + lane[None, :], mask=real, other=0.0)
        new_top = tl.load(tops + at, mask=real, other=0.0)
        new_total = tl.load(totals + at, mask=real, other=0.0)
        acc, top, total = merge(acc, top, total, new_acc, new_top, new_total)
    if SINKS:
        sink = tl.load(sink_at[:, None], mask=real, other=0.0).to(tl.float32) * LOG2_E
        nothing = tl.zeros([R, BLOCK_D], tl.float32)
        acc, top, total = merge(acc, top, total, nothing, sink, tl.full([R, 1], 1.0, tl.float32))
    result = tl.where(total == 0, 0.0, acc / tl.where(total == 0, 1.0, total))
    tl.store(out, result.to(out.dtype.element_ty), mask=real & (lane < D)[None, :])


def decode_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    *,
    scale: float | None = None,
    window: Window | None = None,
    sinks: torch.Tensor | None = None,
    cut: Cut | None = None,
    plan: DecodePlan | None = None,
) -> torch.Tensor:
    """One token a sequence, the last of its context: [B, Hq, D] like q.

    `q` [B, Hq, D], contiguous. `keys` and `values` [pages, Hk, page size, D], contiguous: the keys that one program
    reads for its head then lie page by page in one piece. Hk divides Hq. `block_tables` [B, most pages] int32, rows
    of any stride: page numbers, needed up to the context alone. `context_lens` [B] int32 or int64, the token itself
    included; 0 is padding and gives zeros. `scale` of scores, 1 / sqrt(D) if not given.
    `sinks` [Hq]: scores that take probability from all keys, and are not scaled.

    Raises ValueError for more than `COUNTERS` pairs of sequence and key head.

    However long the tables are, no more programs are launched than fill the device.
    """
    out = torch.empty_like(q)
    if len(q):
        places = block_tables, None, context_lens
        _launch(q, keys, values, *places, out, scale=scale, window=window, sinks=sinks, cut=cut, plan=plan)
    return out


def decode_ones(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block_tables: torch.Tensor,
    cu_seqlens: torch.Tensor,
    context_lens: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float | None = None,
    window: Window | None = None,
    sinks: torch.Tensor | None = None,
    cut: Cut | None = None,
) -> None:
    """Of sequences as in `prefill_attention` those with one new token, into their rows of `out` alone."""
    places = block_tables, cu_seqlens, context_lens
    _launch(q, keys, values, *places, out, scale=scale, window=window, sinks=sinks, cut=cut, plan=_ONES)


_ONES = DecodePlan(programs=4096)
"""Most sequences beside prompts have none or many new tokens: their programs end at once."""


def _launch(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    block_tables: torch.Tensor,
    bounds: torch.Tensor | None,
    context_lens: torch.Tensor,
    out: torch.Tensor,
    *,
    scale: float | None,
    window: Window | None,
    sinks: torch.Tensor | None,
    cut: Cut | None,
    plan: DecodePlan | None,
) -> None:
    """Row b of q is of sequence b, or with `bounds` that is where rows of sequence b begin."""
    sequences, (_, heads, dim) = len(context_lens), q.shape
    _, kv_heads, page, _ = keys.shape
    if sequences * kv_heads > COUNTERS:
        raise ValueError(f"{sequences} sequences of {kv_heads} key heads are more than {COUNTERS}")
    cut, plan = cut or CUT[q.dtype], plan or DecodePlan()
    group, block_d = heads // kv_heads, max(power_of_2(dim), 16)
    splits = triton.cdiv(block_tables.shape[1] * page, cut.split)
    parts = q.new_empty(sequences, heads, splits, block_d, dtype=torch.float32)
    tops = q.new_empty(sequences, heads, splits, dtype=torch.float32)
    totals = torch.empty_like(tops)
    sharing = min(splits, max(1, plan.programs // (kv_heads * sequences)))
    _decode_kernel[(kv_heads, sequences, sharing)](
        q,
        keys,
        values,
        block_tables,
        context_lens if bounds is None else bounds,
        context_lens,
        parts,
        tops,
        totals,
        out,
        q if sinks is None else sinks,
        counters(q.device),
        exponent_scale(dim, scale),
        block_tables.stride(0),
        splits,
        HK=kv_heads,
        G=group,
        D=dim,
        BLOCK_D=block_d,
        R=max(power_of_2(group), 16),
        PAGE=page,
        SPLIT=cut.split,
        BLOCK=cut.block,
        WINDOW=window.size if window else 0,
        CHUNKED=window is not None and window.chunked,
        SINKS=sinks is not None,
        ONES=bounds is not None,
        num_warps=plan.warps,
        num_stages=plan.stages,
        enable_fp_fusion=False,
    )
