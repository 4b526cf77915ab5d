"""Attention over a paged KV cache, in fixed tiles (see batch.py).

A softmax row is as long as the batch's longest context, in whole key blocks. Keys that a query may not see get -inf,
hence a probability of exactly zero, and zeros at the end of a row change no sum: so a longer neighbour changes no bit.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from elastic_ep.model.batch import KEY_BLOCK, QUERY_TILE, Batch, CacheLayout
from elastic_ep.model.config import ModelConfig
from elastic_ep.model.layers import Rope, linear
from elastic_ep.model.weights import LayerWeights


class KVCache:
    """`layers[i]` [rows, D], rows as `CacheLayout` orders them."""

    def __init__(self, config: ModelConfig, layout: CacheLayout, device: torch.device) -> None:
        self.layers = [
            torch.zeros(layout.rows, config.head_dim, device=device) for _ in range(config.num_hidden_layers)
        ]

    def forget(self, batch: Batch) -> None:
        """Zero what `batch` wrote. A poisoned step may have left NaN, and zero probability times NaN is NaN."""
        for layer in self.layers:
            layer.index_fill_(0, batch.write_rows, 0.0)


def attention(
    x: torch.Tensor,
    weights: LayerWeights,
    cache: torch.Tensor,
    batch: Batch,
    config: ModelConfig,
    layout: CacheLayout,
    rope: tuple[Rope, torch.Tensor, torch.Tensor],
) -> torch.Tensor:
    """x [Tp, H], normed, to [Tp, H]. Writes the batch's keys and values to `cache`."""
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    qkv = linear(x, weights.qkv).view(-1, heads + 2 * kv_heads, dim)
    qk = functional.rms_norm(qkv[:, : heads + kv_heads], (dim,), None, config.rms_norm_eps)
    rotary, cos, sin = rope
    qk = rotary.rotate(qk.mul_(weights.qk_norm), cos, sin)
    kv = torch.cat((qk[:, heads:], qkv[:, heads + kv_heads :]), dim=1)
    cache.index_copy_(0, batch.write_rows, kv.view(-1, dim))

    q = qk.view(-1, dim).index_select(0, batch.query_rows).view(-1, QUERY_TILE * layout.group, dim)
    pages = cache.view(-1, layout.page_size * dim).index_select(0, batch.context)
    keys, values = pages.view(2, -1, KEY_BLOCK, dim).unbind(0)
    out = _attend(q, keys, values, batch.bias, batch.num_blocks)
    out = out.view(-1, dim).index_select(0, batch.output_rows)
    return linear(out.view(-1, heads * dim), weights.out)


def _attend(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, bias: torch.Tensor, blocks: int
) -> torch.Tensor:
    """q [B * M, rows, D], keys and values [B * M, KEY_BLOCK, D], bias [B * M, rows, KEY_BLOCK] to [M, rows, D].

    M is N * Hk: the work items. Every product has the shape of one block.
    """
    scores = torch.baddbmm(bias, q, keys.transpose(1, 2), alpha=q.shape[-1] ** -0.5)
    if blocks == 1:
        return torch.bmm(torch.softmax(scores, dim=-1), values)
    rows = scores.shape[1]
    joined = (
        scores.view(blocks, -1, rows, KEY_BLOCK).permute(1, 2, 0, 3).reshape(-1, rows, blocks * KEY_BLOCK)
    )
    joined = torch.softmax(joined, dim=-1)
    parts = joined.view(-1, rows, blocks, KEY_BLOCK).permute(2, 0, 1, 3).reshape(-1, rows, KEY_BLOCK)
    sums = torch.bmm(parts, values).view(blocks, -1, rows, q.shape[-1])
    out = sums[0]
    for block in sums[1:]:  # one after the other: a block of zeros at the end then changes no bit
        out += block
    return out
