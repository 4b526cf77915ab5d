"""One token a row from its logits: the most likely one, or one drawn with Gumbel noise, of those that a mask leaves.

What is computed, and in which order, is said by engine/sampler.py. A row is cut into parts, so that few rows fill the
device: each program finds the largest score of a part, then the largest with noise, and a last one takes the largest of
these, of equals the first. Nothing as wide as the vocabulary is written.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from elastic_ep.engine.sampler import GOLDEN, MIX_MULTIPLIERS, OUTSIDE
from elastic_ep.kernel import jit, power_of_2

_BLOCK = 1024
_BLOCKS = 8
"""Of a part."""
_OUTSIDE = tl.constexpr(OUTSIDE)
_LEAST = tl.constexpr(-3.5e38)
"""Less than any float32."""
_GOLDEN = tl.constexpr(GOLDEN)
_FIRST, _SECOND = (tl.constexpr(multiplier) for multiplier in MIX_MULTIPLIERS)


@jit
def _scores(
    logits: tl.tensor,
    masks: tl.tensor,
    row: tl.tensor,
    token: tl.tensor,
    V: tl.constexpr,
    WORDS: tl.constexpr,
    MASKED: tl.constexpr,
) -> tl.tensor:
    """Of the tokens [BLOCK] float64, all finite: of a poisoned step logits may be anything."""
    exists = token < V
    score = tl.load(logits + token, mask=exists, other=0.0).to(tl.float64)
    score = tl.where(score > _LEAST, score, _LEAST)
    if MASKED:
        word = tl.load(masks + row * WORDS + token // 32, mask=exists, other=-1)
        score = tl.where(((word >> (token % 32)) & 1) != 0, score, tl.zeros_like(score) + _OUTSIDE)
    return score


@jit
def _noise(state: tl.tensor, token: tl.tensor) -> tl.tensor:
    """As `sampler.gumbel`."""
    word = state.to(tl.uint64, bitcast=True) + (token + 1).to(tl.uint64) * tl.full([1], _GOLDEN, tl.uint64)
    word = (word ^ (word >> 30)) * tl.full([1], _FIRST, tl.uint64)
    word = (word ^ (word >> 27)) * tl.full([1], _SECOND, tl.uint64)
    word = word ^ (word >> 31)
    uniform = ((word >> 11).to(tl.int64).to(tl.float64) + 0.5) * (0.5**53)
    return -tl.log(-tl.log(uniform))


@jit
def _largest_kernel(
    logits: tl.tensor,
    rows: tl.tensor,
    masks: tl.tensor,
    tops: tl.tensor,
    stride: tl.tensor,
    V: tl.constexpr,
    WORDS: tl.constexpr,
    MASKED: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    logits += tl.load(rows + row) * stride
    top = tl.full([BLOCK], -float("inf"), tl.float64)
    for block in range(BLOCKS):
        token = (tl.program_id(1) * BLOCKS + block) * BLOCK + tl.arange(0, BLOCK)
        score = _scores(logits, masks, row, token, V, WORDS, MASKED)
        top = tl.maximum(top, tl.where(token < V, score, -float("inf")))
    tl.store(tops + row * tl.num_programs(1) + tl.program_id(1), tl.max(top, axis=0))


@jit
def _draw_kernel(
    logits: tl.tensor,
    rows: tl.tensor,
    masks: tl.tensor,
    states: tl.tensor,
    settings: tl.tensor,
    tops: tl.tensor,
    values: tl.tensor,
    tokens: tl.tensor,
    stride: tl.tensor,
    V: tl.constexpr,
    WORDS: tl.constexpr,
    MASKED: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    logits += tl.load(rows + row) * stride
    part = tl.arange(0, BLOCK_P)
    top = tl.max(tl.load(tops + row * PARTS + part, mask=part < PARTS, other=-float("inf")), axis=0)
    temperature = tl.load(settings + row * 3)
    floor = tl.load(settings + row * 3 + 1)
    greedy = tl.load(settings + row * 3 + 2) > 0
    state = tl.load(states + row)
    best = tl.full([BLOCK], -float("inf"), tl.float64)
    chosen = tl.zeros([BLOCK], tl.int32) + V
    for block in range(BLOCKS):
        token = (tl.program_id(1) * BLOCKS + block) * BLOCK + tl.arange(0, BLOCK)
        value = _scores(logits, masks, row, token, V, WORDS, MASKED)
        if not greedy:
            value = (value - top) / temperature
            value = tl.where(value < floor, -float("inf"), value) + _noise(state, token)
        better = (token < V) & (value > best)
        best = tl.where(better, value, best)
        chosen = tl.where(better, token, chosen)
    value = tl.max(best, axis=0)
    at = row * PARTS + tl.program_id(1)
    tl.store(values + at, value)
    tl.store(tokens + at, tl.min(tl.where(best == value, chosen, V), axis=0))


@jit
def _choose_kernel(
    values: tl.tensor,
    tokens: tl.tensor,
    out: tl.tensor,
    V: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
) -> None:
    row = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK_P)
    value = tl.load(values + row * PARTS + part, mask=part < PARTS, other=-float("inf"))
    token = tl.load(tokens + row * PARTS + part, mask=part < PARTS, other=V)
    token = tl.min(tl.where(value == tl.max(value, axis=0), token, V), axis=0)
    tl.store(out + row, tl.where(token < V, token, 0).to(tl.int64))  # of a poisoned step there may be none


def draw_tokens(
    logits: torch.Tensor,
    rows: torch.Tensor,
    states: torch.Tensor,
    settings: torch.Tensor,
    masks: torch.Tensor | None = None,
) -> torch.Tensor:
    """[n] int64, from the rows `rows` [n] int64 of `logits` [>= n, V] float32, whose rows are contiguous.

    `states` [n] int64 from `key_state`. `settings` [n, 3] float64, contiguous: temperature, the least score divided by
    it, and whether the row is greedy. `masks` [n, words] int32, contiguous: bit v of a row says that v may come.
    """
    count, vocabulary = len(rows), logits.shape[1]
    parts = triton.cdiv(vocabulary, _BLOCK * _BLOCKS)
    tops = torch.empty(count, parts, dtype=torch.float64, device=logits.device)
    values = torch.empty_like(tops)
    tokens = torch.empty(count, parts, dtype=torch.int32, device=logits.device)
    out = torch.empty(count, dtype=torch.int64, device=logits.device)
    if not count:
        return out
    words = tokens if masks is None else masks
    common = {
        "V": vocabulary,
        "WORDS": words.shape[1],
        "MASKED": masks is not None,
        "BLOCK": _BLOCK,
        "BLOCKS": _BLOCKS,
    }
    _largest_kernel[(count, parts)](logits, rows, words, tops, logits.stride(0), **common)
    _draw_kernel[(count, parts)](
        logits,
        rows,
        words,
        states,
        settings,
        tops,
        values,
        tokens,
        logits.stride(0),
        PARTS=parts,
        BLOCK_P=power_of_2(parts),
        **common,
        enable_fp_fusion=False,
    )
    _choose_kernel[(count,)](values, tokens, out, V=vocabulary, PARTS=parts, BLOCK_P=power_of_2(parts))
    return out
