"""Attention over a paged KV cache, in fixed tiles (see batch.py).

Products are taken only of pairs, a query tile and a key block that it may see. In between, the scores of a tile are
joined to rows as long as the batch's longest context, in whole key blocks. Keys that a query may not see get -inf, hence
a probability of exactly zero, and zeros at the end of a row change no sum: so a longer neighbour changes no bit.
"""

from __future__ import annotations

import torch

from elastic_ep.engine.ops_cpu.batch import KEY_BLOCK, QUERY_TILE, Batch, CacheLayout
from elastic_ep.engine.ops_cpu.layers import widened


def attend(qk: torch.Tensor, cache: torch.Tensor, batch: Batch, layout: CacheLayout) -> torch.Tensor:
    """[Tp, Hq D] of qk [Tp, Hq + Hk, D], whose keys are in `cache` already, rows as `CacheLayout` orders them."""
    dim = qk.shape[-1]
    q = qk.view(-1, dim).index_select(0, batch.query_rows).view(-1, QUERY_TILE * layout.group, dim)
    pages = cache.view(-1, layout.page_size * dim).index_select(0, batch.context)
    keys, values = pages.view(2, -1, KEY_BLOCK, dim).unbind(0)
    out = _attend(q, keys, widened(values), batch, batch.num_tiles * layout.num_kv_heads)
    out = out[..., :dim].reshape(-1, dim).index_select(0, batch.output_rows)
    return out.view(-1, layout.num_heads * dim)


def _attend(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, batch: Batch, outputs: int
) -> torch.Tensor:
    """q [P * Hk, rows, D], keys [P * Hk, KEY_BLOCK, D], values [.., Dv] to [outputs, rows, Dv]; `outputs` is N * Hk."""
    (items, rows, _), dim, blocks = q.shape, values.shape[-1], batch.num_blocks
    scores = torch.baddbmm(batch.bias, q, keys.transpose(1, 2), alpha=q.shape[-1] ** -0.5)
    if blocks == 1:
        return torch.bmm(torch.softmax(scores, dim=-1), values)
    joined = scores.new_full((outputs * rows * blocks, KEY_BLOCK), -torch.inf)
    joined.index_copy_(0, batch.score_rows, scores.view(-1, KEY_BLOCK))
    joined = torch.softmax(joined.view(-1, blocks * KEY_BLOCK), dim=-1).view(-1, KEY_BLOCK)
    shares = joined.index_select(0, batch.score_rows).view(items, rows, KEY_BLOCK)
    parts = q.new_zeros(blocks * outputs, rows * dim)
    parts.index_copy_(0, batch.part_rows, torch.bmm(shares, values).view(items, -1))
    out, *later = parts.view(blocks, outputs, rows, dim).unbind(0)
    for part in later:  # one after the other: a block of zeros at the end then changes no bit
        out += part
    return out
