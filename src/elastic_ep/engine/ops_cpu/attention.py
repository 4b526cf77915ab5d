"""Attention over a paged KV cache, in fixed tiles (see batch.py).

Products are taken only of pairs, a query tile and a key block that it may see. In between, the scores of a tile are
joined to rows as long as the batch's longest context, in whole key blocks. Keys that a query may not see get -inf, hence
a probability of exactly zero, and zeros at the end of a row change no sum: so a longer neighbour changes no bit.
"""

from __future__ import annotations

import torch

from elastic_ep.engine.ops_cpu.batch import KEY_BLOCK, QUERY_TILE, Batch, CacheLayout
from elastic_ep.engine.ops_cpu.layers import widened


def attend(
    qk: torch.Tensor,
    cache: torch.Tensor,
    batch: Batch,
    layout: CacheLayout,
    bias: torch.Tensor,
    scale: float,
    *,
    value_dim: int,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """[Tp, Hq Dv] of qk [Tp, Hq + Hk, D], whose keys are in `cache` already, rows as `CacheLayout` orders them.

    `bias` is one of the batch's; `sinks` [Hq].
    """
    dim = qk.shape[-1]
    q = qk.view(-1, dim).index_select(0, batch.query_rows).view(-1, QUERY_TILE * layout.group, dim)
    pages = cache.view(-1, layout.page_size * dim).index_select(0, batch.context)
    if layout.latent:
        keys = pages.view(-1, KEY_BLOCK, dim)
        values = keys[..., :value_dim]
    else:
        keys, values = pages.view(2, -1, KEY_BLOCK, dim).unbind(0)
    scores = torch.baddbmm(bias, q, keys.transpose(1, 2), alpha=scale)
    outputs = batch.num_tiles * layout.num_kv_heads
    sunk = None if sinks is None else _sink_block(sinks, layout, outputs)
    out = _weigh(scores, widened(values), batch, outputs, sunk)
    out = out[..., :value_dim].reshape(-1, value_dim).index_select(0, batch.output_rows)
    return out.view(-1, layout.num_heads * value_dim)


def _sink_block(sinks: torch.Tensor, layout: CacheLayout, outputs: int) -> torch.Tensor:
    """[outputs * rows, KEY_BLOCK]: before a row's key blocks stands one of its head's sink alone.

    It is as wide as a block, so that keys keep their places within the sums.
    """
    by_row = sinks.view(layout.num_kv_heads, 1, layout.group).expand(-1, QUERY_TILE, -1).reshape(-1)
    block = sinks.new_full((len(by_row), KEY_BLOCK), -torch.inf)
    block[:, 0] = by_row
    return block.repeat(outputs // layout.num_kv_heads, 1)


def _weigh(
    scores: torch.Tensor, values: torch.Tensor, batch: Batch, outputs: int, sunk: torch.Tensor | None
) -> torch.Tensor:
    """scores [P * Hk, rows, KEY_BLOCK], values [P * Hk, KEY_BLOCK, Dv] to [outputs, rows, Dv]; `outputs` is N * Hk."""
    (items, rows, _), dim, blocks = scores.shape, values.shape[-1], batch.num_blocks
    if blocks == 1:
        return torch.bmm(_softmax(scores.view(-1, KEY_BLOCK), sunk).view(scores.shape), values)
    joined = scores.new_full((outputs * rows * blocks, KEY_BLOCK), -torch.inf)
    joined.index_copy_(0, batch.score_rows, scores.view(-1, KEY_BLOCK))
    joined = _softmax(joined.view(-1, blocks * KEY_BLOCK), sunk).reshape(-1, KEY_BLOCK)
    shares = joined.index_select(0, batch.score_rows).view(items, rows, KEY_BLOCK)
    parts = scores.new_zeros(blocks * outputs, rows * dim)
    parts.index_copy_(0, batch.part_rows, torch.bmm(shares, values).view(items, -1))
    out, *later = parts.view(blocks, outputs, rows, dim).unbind(0)
    for part in later:  # one after the other: a block of zeros at the end then changes no bit
        out += part
    return out


def _softmax(scores: torch.Tensor, sunk: torch.Tensor | None) -> torch.Tensor:
    if sunk is None:
        return torch.softmax(scores, dim=-1)
    return torch.softmax(torch.cat((sunk, scores), dim=-1), dim=-1)[:, KEY_BLOCK:]
