"""Attention over a paged KV cache, in fixed tiles (see batch.py).

A softmax row is as long as the batch's longest context, in whole key blocks. Keys that a query may not see get -inf,
hence a probability of exactly zero, and zeros at the end of a row change no sum: so a longer neighbour changes no bit.
"""

from __future__ import annotations

import torch

from elastic_ep.model.batch import KEY_BLOCK, QUERY_TILE, Batch, CacheLayout
from elastic_ep.model.config import ModelConfig
from elastic_ep.model.layers import Rope, linear, rms_norm
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
    rows = x.shape[0]
    heads, kv_heads, dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    qkv = linear(x, weights.qkv).view(rows, heads + 2 * kv_heads, dim)
    rotary, cos, sin = rope
    qk = rotary.rotate(rms_norm(qkv[:, : heads + kv_heads], weights.qk_norm, config.rms_norm_eps), cos, sin)
    kv = torch.cat((qk[:, heads:], qkv[:, heads + kv_heads :]), dim=1)
    cache.index_copy_(0, batch.write_rows, kv.view(-1, dim))

    tile_rows = QUERY_TILE * heads // kv_heads
    q = qk.view(-1, dim).index_select(0, batch.query_rows).view(-1, tile_rows, dim)
    pages = cache.view(-1, layout.page_size * dim)
    keys_values = [
        pages.index_select(0, block).view(2, -1, KEY_BLOCK, dim).unbind(0) for block in batch.context
    ]
    out = _attend(q, keys_values, batch.bias, dim**-0.5)
    return linear(out.view(-1, dim).index_select(0, batch.output_rows).view(rows, heads * dim), weights.out)


def _attend(
    q: torch.Tensor,
    keys_values: list[tuple[torch.Tensor, ...]],
    bias: tuple[torch.Tensor, ...],
    scale: float,
) -> torch.Tensor:
    """q [N * Hk, rows, D]; per block keys and values [N * Hk, KEY_BLOCK, D] and bias [N * Hk, rows, KEY_BLOCK]."""
    scores = [
        torch.baddbmm(block_bias, q, keys.transpose(1, 2), alpha=scale)
        for (keys, _), block_bias in zip(keys_values, bias, strict=True)
    ]
    joined = scores[0] if len(scores) == 1 else torch.cat(scores, dim=-1)
    parts = torch.softmax(joined, dim=-1).chunk(len(scores), dim=-1)
    out = torch.bmm(parts[0], keys_values[0][1])
    for part, (_, values) in zip(parts[1:], keys_values[1:], strict=True):
        out += torch.bmm(part, values)
    return out
