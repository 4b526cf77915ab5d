"""Attention over cached latents (DeepSeek's MLA): one key a token for all heads, which begins with its value.

Queries come as the latents see them, and results leave as latents (the products that make them are absorbed into what is
around, `by_head.py`). A tile is `LatentPlan.rows` rows, heads of a token or of neighbouring tokens, so that what is read
of the cache serves as many rows as registers have room for; it is read once, as keys and as values.

Why prompts are computed in the same way, and not with keys and values expanded from latents, which would be a third
of the arithmetic for a long chunk: those are other sums. A request that moves is computed again as a prompt, and must go
on with the bits that it would have had. So both kernels here call `_attend`, whose bits depend on the cut alone.

A context is cut as paged_attention.py says. Decode does the splits in parallel, and whoever ends last merges them, first
to last. Prefill does them one after the other; two sums of a tile do not fit the registers, so the sum so far waits
in global memory, out of the L2 cache, while a split is computed: a short write and read for each thousand keys. Both
launch as many programs as there are multiprocessors, which take items in turn: an empty program would cost a
microsecond, as its shared memory leaves no room for a second one.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from elastic_ep.engine.ops_cuda.kernels.paged_attention import (
    Cut,
    exact_sum,
    exponent_scale,
    merge,
    pages_of,
    part_bytes,
)
from elastic_ep.kernel import COUNTERS, counters, dot, jit, power_of_2, processors

LATENT_CUT = Cut(split=1024, block=64)
"""See `CUT`."""
PARTS_BYTES = 1 << 30
"""Of parts at a time: a larger batch is computed in turns."""
_COLUMNS = 128
"""Of a sum, that are merged at a time."""


@dataclass(frozen=True, slots=True)
class LatentPlan:
    """The same for every batch: see `DecodePlan`."""

    rows: int
    warps: int
    stages: int


def plan_of(heads: int, dtype: torch.dtype) -> LatentPlan:
    if dtype == torch.float32:
        return LatentPlan(16, 4, 1)
    return LatentPlan(16 if heads <= 16 else 64, 8, 2)


@jit
def _attend(
    q: tl.tensor,
    q_turned: tl.tensor,
    latents: tl.tensor,
    table: tl.tensor,
    first: tl.tensor,
    end: tl.tensor,
    last_seen: tl.tensor,
    scale: tl.tensor,
    KV: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
    R: tl.constexpr,
    PAGE: tl.constexpr,
    BLOCK: tl.constexpr,
) -> tl.tensor:
    """Keys first..end for q [R, BLOCK_KV] and q_turned [R, BLOCK_ROPE], row r up to key `last_seen`[r]: sum, not yet
    divided by the total, [BLOCK_KV, R], maximum [R], total [R]. A row that sees none of the keys has sum 0, maximum
    -inf, total 0.

    Latents are on the left of both products, so that there may be as few rows as 16 (see expert_ffn.py).
    """
    lane = tl.arange(0, BLOCK_KV)
    turned = tl.arange(0, BLOCK_ROPE)
    acc = tl.zeros([BLOCK_KV, R], tl.float32)
    weight = tl.zeros([BLOCK, R], tl.float32)
    top = tl.full([R], -float("inf"), tl.float32)
    seen = tl.max(last_seen, axis=0)
    page = pages_of(table, first, end, PAGE, BLOCK)
    for start in range(first, end, BLOCK):
        key = start + tl.arange(0, BLOCK)
        exists = key < end
        at = (page.to(tl.int64) * PAGE + key % PAGE)[:, None] * (KV + ROPE)
        real = exists[:, None]
        if KV == BLOCK_KV:
            k = tl.load(latents + at + lane[None, :], mask=real, other=0.0)
        else:
            k = tl.load(latents + at + lane[None, :], mask=real & (lane < KV)[None, :], other=0.0)
        if ROPE == BLOCK_ROPE:
            k_turned = tl.load(latents + KV + at + turned[None, :], mask=real, other=0.0)
        else:
            real = real & (turned < ROPE)[None, :]
            k_turned = tl.load(latents + KV + at + turned[None, :], mask=real, other=0.0)
        page = pages_of(table, start + BLOCK, end, PAGE, BLOCK)
        p = tl.zeros([BLOCK, R], k.dtype)
        fade = tl.full([R], 1.0, tl.float32)
        # Always so. HAZARD: where the compiler sees that scores go into another product, each half of the warps computes
        # all of them, which takes as long as all else; it does not look out of a branch. Nor does it if the scores' two
        # products go into one another.
        if start <= seen:
            zero = tl.zeros([BLOCK, R], tl.float32)
            score = dot(k, tl.trans(q), zero) * scale + dot(k_turned, tl.trans(q_turned), zero) * scale
            score = tl.where(exists[:, None] & (key[:, None] <= last_seen[None, :]), score, -float("inf"))
            new_top = tl.maximum(top, tl.max(score, axis=0))
            base = tl.where(new_top == -float("inf"), 0.0, new_top)
            fade = tl.exp2(top - base)
            share = tl.exp2(score - base[None, :])
            weight = tl.fma(weight, tl.broadcast_to(fade[None, :], [BLOCK, R]), share)
            top = new_top
            p = share.to(k.dtype)
        acc = dot(tl.trans(k), p, acc * fade[None, :])
    return acc, top, exact_sum(weight, 0)


@jit
def _latent_decode_kernel(
    q: tl.tensor,
    latents: tl.tensor,
    tables: tl.tensor,
    lengths: tl.tensor,
    parts: tl.tensor,
    tops: tl.tensor,
    totals: tl.tensor,
    out: tl.tensor,
    ended: tl.tensor,
    scale: tl.tensor,
    table_stride: tl.tensor,
    sequences: tl.tensor,
    splits: tl.tensor,
    HQ: tl.constexpr,
    G: tl.constexpr,
    KV: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
    R: tl.constexpr,
    PAGE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_B: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    GROUPS: tl.constexpr = (HQ + G - 1) // G
    sequence = tl.arange(0, BLOCK_B)
    context = tl.load(lengths + sequence, mask=sequence < sequences, other=0).to(tl.int32)
    pieces = (context + SPLIT - 1) // SPLIT
    ends = tl.cumsum(pieces, axis=0)
    lane = tl.arange(0, BLOCK_KV)
    turned = tl.arange(0, BLOCK_ROPE)
    row = tl.arange(0, R)
    # Groups of heads are fastest: programs at work at a time share latents.
    for item in range(tl.program_id(0), tl.sum(pieces, axis=0) * GROUPS, tl.num_programs(0)):
        piece = item // GROUPS
        mine = tl.sum((ends <= piece).to(tl.int32), axis=0)
        here = sequence == mine
        split = piece - tl.sum(tl.where(here, ends - pieces, 0), axis=0)
        length = tl.sum(tl.where(here, context, 0), axis=0)
        head = item % GROUPS * G + row
        real = (row < G) & (head < HQ)
        query = (mine * HQ + head).to(tl.int64)
        source = q + query[:, None] * (KV + ROPE)
        turned_acc, top, total = _attend(
            tl.load(source + lane[None, :], mask=real[:, None] & (lane < KV)[None, :], other=0.0),
            tl.load(source + KV + turned[None, :], mask=real[:, None] & (turned < ROPE)[None, :], other=0.0),
            latents,
            tables + mine.to(tl.int64) * table_stride,
            split * SPLIT,
            tl.minimum(split * SPLIT + SPLIT, length),
            tl.where(real, length, 0) - 1,
            scale,
            KV,
            ROPE,
            BLOCK_KV,
            BLOCK_ROPE,
            R,
            PAGE,
            BLOCK,
        )
        acc = tl.trans(turned_acc)
        count = (length + SPLIT - 1) // SPLIT
        if count == 1:
            _finish(
                acc,
                total[:, None],
                out + query[:, None] * KV + lane[None, :],
                real[:, None] & (lane < KV)[None, :],
            )
        else:
            at = query * splits + split
            tl.store(parts + at[:, None] * BLOCK_KV + lane[None, :], acc, mask=real[:, None])
            tl.store(tops + at, top, mask=real)
            tl.store(totals + at, total, mask=real)
            tl.debug_barrier()  # the stores of all threads come before the one that counts them
            counter = ended + mine * GROUPS + item % GROUPS
            if tl.atomic_add(counter, 1) == count - 1:
                for column in range(0, BLOCK_KV, COLUMNS):
                    _merge_columns(
                        parts, tops, totals, out, query, real, splits, count, column, KV, BLOCK_KV, R, COLUMNS
                    )
                tl.store(counter, 0)
    for idle in range(tl.program_id(0), sequences, tl.num_programs(0)):
        if tl.load(lengths + idle) == 0:
            for head in range(HQ):
                nothing = tl.zeros([BLOCK_KV], out.dtype.element_ty)
                tl.store(out + (idle * HQ + head) * KV + lane, nothing, mask=lane < KV)


@jit
def _merge_columns(
    parts: tl.tensor,
    tops: tl.tensor,
    totals: tl.tensor,
    out: tl.tensor,
    query: tl.tensor,
    real: tl.tensor,
    splits: tl.tensor,
    count: tl.tensor,
    column: tl.tensor,
    KV: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    R: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> None:
    """Of the rows `query` [R] that are `real`, from `count` splits, each of which some program has stored."""
    lane = column + tl.arange(0, COLUMNS)
    mask = real[:, None]
    acc = tl.zeros([R, COLUMNS], tl.float32)
    top = tl.full([R, 1], -float("inf"), tl.float32)
    total = tl.zeros([R, 1], tl.float32)
    at = (query * splits)[:, None]
    for first in range(0, count, 4):
        # All loads before the first use: one after the other they would take as many times as long.
        acc_0, top_0, total_0 = _part(parts, tops, totals, at, first, count, lane, mask, BLOCK_KV)
        acc_1, top_1, total_1 = _part(parts, tops, totals, at, first + 1, count, lane, mask, BLOCK_KV)
        acc_2, top_2, total_2 = _part(parts, tops, totals, at, first + 2, count, lane, mask, BLOCK_KV)
        acc_3, top_3, total_3 = _part(parts, tops, totals, at, first + 3, count, lane, mask, BLOCK_KV)
        acc, top, total = merge(acc, top, total, acc_0, top_0, total_0)
        if first + 1 < count:
            acc, top, total = merge(acc, top, total, acc_1, top_1, total_1)
        if first + 2 < count:
            acc, top, total = merge(acc, top, total, acc_2, top_2, total_2)
        if first + 3 < count:
            acc, top, total = merge(acc, top, total, acc_3, top_3, total_3)
    _finish(acc, total, out + query[:, None] * KV + lane[None, :], mask & (lane < KV)[None, :])


@jit
def _part(
    parts: tl.tensor,
    tops: tl.tensor,
    totals: tl.tensor,
    at: tl.tensor,
    split: tl.tensor,
    count: tl.tensor,
    lane: tl.tensor,
    mask: tl.tensor,
    BLOCK_KV: tl.constexpr,
) -> tl.tensor:
    """Columns `lane` of rows whose first parts lie at `at` [R, 1]: sum, maximum, total of a split, if there is such."""
    at += split
    mask = mask & (split < count)
    acc = tl.load(parts + at * BLOCK_KV + lane[None, :], mask=mask, other=0.0)
    return acc, tl.load(tops + at, mask=mask, other=0.0), tl.load(totals + at, mask=mask, other=0.0)


@jit
def _finish(acc: tl.tensor, total: tl.tensor, out: tl.tensor, mask: tl.tensor) -> None:
    """acc [R, n], total [R, 1]; out points to each number's place."""
    result = tl.where(total == 0, 0.0, acc / tl.where(total == 0, 1.0, total))
    tl.store(out, result.to(out.dtype.element_ty), mask=mask)


@jit
def _latent_prefill_kernel(
    q: tl.tensor,
    latents: tl.tensor,
    tables: tl.tensor,
    bounds: tl.tensor,
    lengths: tl.tensor,
    sums: tl.tensor,
    out: tl.tensor,
    scale: tl.tensor,
    table_stride: tl.tensor,
    sequences: tl.tensor,
    HQ: tl.constexpr,
    G: tl.constexpr,
    KV: tl.constexpr,
    ROPE: tl.constexpr,
    BLOCK_KV: tl.constexpr,
    BLOCK_ROPE: tl.constexpr,
    R: tl.constexpr,
    TOKENS: tl.constexpr,
    PAGE: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_B: tl.constexpr,
) -> None:
    GROUPS: tl.constexpr = (HQ + G - 1) // G
    sequence = tl.arange(0, BLOCK_B)
    known = sequence < sequences
    begin = tl.load(bounds + sequence, mask=known, other=0).to(tl.int32)
    size = tl.load(bounds + sequence + 1, mask=known, other=0).to(tl.int32) - begin
    tiles = (size + TOKENS - 1) // TOKENS
    ends = tl.cumsum(tiles, axis=0)
    most = tl.sum(tiles, axis=0)
    lane = tl.arange(0, BLOCK_KV)
    turned = tl.arange(0, BLOCK_ROPE)
    row = tl.arange(0, R)
    spare = sums + tl.program_id(0).to(tl.int64) * (R * BLOCK_KV) + lane[:, None] * R + row[None, :]
    for item in range(tl.program_id(0), most * GROUPS, tl.num_programs(0)):
        tile = most - 1 - item // GROUPS  # those with the longest contexts first
        mine = tl.sum((ends <= tile).to(tl.int32), axis=0)
        here = sequence == mine
        offset = (tile - tl.sum(tl.where(here, ends - tiles, 0), axis=0)) * TOKENS
        first_row = tl.sum(tl.where(here, begin, 0), axis=0)
        tokens = tl.sum(tl.where(here, size, 0), axis=0)
        length = tl.load(lengths + mine).to(tl.int32)
        token = offset + row // G
        head = item % GROUPS * G + row % G
        real = (row < TOKENS * G) & (token < tokens) & (head < HQ)
        query = (first_row + token).to(tl.int64) * HQ + head
        source = q + query[:, None] * (KV + ROPE)
        mask = real[:, None] & (lane < KV)[None, :]
        plain = tl.load(source + lane[None, :], mask=mask, other=0.0)
        rotated = tl.load(
            source + KV + turned[None, :], mask=real[:, None] & (turned < ROPE)[None, :], other=0.0
        )
        seen = length - tokens + tl.minimum(offset + TOKENS, tokens)
        top = tl.full([1, R], -float("inf"), tl.float32)
        total = tl.zeros([1, R], tl.float32)
        for first in range(0, seen, SPLIT):
            acc, new_top, new_total = _attend(
                plain,
                rotated,
                latents,
                tables + mine.to(tl.int64) * table_stride,
                first,
                tl.minimum(first + SPLIT, seen),
                tl.where(real, length - tokens + token, -1),
                scale,
                KV,
                ROPE,
                BLOCK_KV,
                BLOCK_ROPE,
                R,
                PAGE,
                BLOCK,
            )
            if first > 0:
                acc, top, total = merge(tl.load(spare), top, total, acc, new_top[None, :], new_total[None, :])
            else:
                top, total = new_top[None, :], new_total[None, :]
            if first + SPLIT < seen:
                tl.store(spare, acc)
                tl.debug_barrier()  # other threads may read it
            else:
                _finish(tl.trans(acc), tl.trans(total), out + query[:, None] * KV + lane[None, :], mask)


def latent_decode(
    q: torch.Tensor,
    latents: torch.Tensor,
    block_tables: torch.Tensor,
    context_lens: torch.Tensor,
    *,
    rank: int,
    scale: float,
    cut: Cut | None = None,
    plan: LatentPlan | None = None,
) -> torch.Tensor:
    """One token a sequence, the last of its context: [B, Hq, rank].

    `q` [B, Hq, rank + rope], contiguous; `latents` [pages, page size, rank + rope], contiguous: of each token the numbers
    that are its value for all heads, `rank` of them, and those that are only in its key. `block_tables` and
    `context_lens` as in `decode_attention`, B at most 1024.
    """
    sequences, heads, dim = q.shape
    page = latents.shape[1]
    out = q.new_empty(sequences, heads, rank)
    if not sequences:
        return out
    cut, plan = cut or LATENT_CUT, plan or plan_of(heads, q.dtype)
    group = heads_of_a_tile(heads, plan.rows)
    groups, block_kv = triton.cdiv(heads, group), max(power_of_2(rank), 16)
    splits = triton.cdiv(block_tables.shape[1] * page, cut.split)
    turn = sequences_at_once(heads, rank, splits)
    for start in range(0, sequences, turn):
        now = slice(start, start + turn)
        count = len(q[now])
        tops = q.new_empty(count, heads, splits, dtype=torch.float32)
        _latent_decode_kernel[(min(processors(q.device), count * groups * splits),)](
            q[now],
            latents,
            block_tables[now],
            context_lens[now],
            tops.new_empty(count, heads, splits, block_kv),
            tops,
            torch.empty_like(tops),
            out[now],
            counters(q.device),
            exponent_scale(dim, scale),
            block_tables.stride(0),
            count,
            splits,
            HQ=heads,
            G=group,
            KV=rank,
            ROPE=dim - rank,
            BLOCK_KV=block_kv,
            BLOCK_ROPE=max(power_of_2(dim - rank), 16),
            R=plan.rows,
            PAGE=page,
            SPLIT=cut.split,
            BLOCK=cut.block,
            BLOCK_B=power_of_2(count),
            COLUMNS=min(_COLUMNS, block_kv),
            num_warps=plan.warps,
            num_stages=plan.stages,
            enable_fp_fusion=False,
        )
    return out


def heads_of_a_tile(heads: int, rows: int) -> int:
    """As many in each of the fewest tiles that a token needs."""
    return -(-heads // -(-heads // rows))


def sequences_at_once(heads: int, rank: int, splits: int) -> int:
    """Whose parts are in memory at a time, in `PARTS_BYTES` if that is enough for sixteen; each counts in a counter."""
    most = min(PARTS_BYTES // part_bytes(heads, rank, splits), COUNTERS // heads)
    return max(most // 16, 1) * 16


def latent_prefill(
    q: torch.Tensor,
    latents: torch.Tensor,
    block_tables: torch.Tensor,
    cu_seqlens: torch.Tensor,
    context_lens: torch.Tensor,
    *,
    rank: int,
    scale: float,
    cut: Cut | None = None,
    plan: LatentPlan | None = None,
) -> torch.Tensor:
    """The last tokens of each sequence, each seeing its context up to itself: [T, Hq, rank].

    `q` [T, Hq, rank + rope], contiguous, rows and the rest as in `prefill_attention`; `latents` and `rank` as in
    `latent_decode`.
    """
    tokens, heads, dim = q.shape
    page, sequences = latents.shape[1], len(context_lens)
    out = q.new_empty(tokens, heads, rank)
    if not tokens or not sequences:
        return out
    cut, plan = cut or LATENT_CUT, plan or plan_of(64, q.dtype)
    group = heads_of_a_tile(heads, plan.rows)
    per_tile, block_kv = plan.rows // group, max(power_of_2(rank), 16)
    most = (triton.cdiv(tokens, per_tile) + sequences) * triton.cdiv(heads, group)
    programs = min(processors(q.device), most)
    _latent_prefill_kernel[(programs,)](
        q,
        latents,
        block_tables,
        cu_seqlens,
        context_lens,
        q.new_empty(programs, plan.rows, block_kv, dtype=torch.float32),
        out,
        exponent_scale(dim, scale),
        block_tables.stride(0),
        sequences,
        HQ=heads,
        G=group,
        KV=rank,
        ROPE=dim - rank,
        BLOCK_KV=block_kv,
        BLOCK_ROPE=max(power_of_2(dim - rank), 16),
        R=plan.rows,
        TOKENS=per_tile,
        PAGE=page,
        SPLIT=cut.split,
        BLOCK=cut.block,
        BLOCK_B=power_of_2(sequences),
        num_warps=plan.warps,
        num_stages=plan.stages,
        enable_fp_fusion=False,
    )
    return out
