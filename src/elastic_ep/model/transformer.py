"""Qwen3-MoE: paged attention on this rank's own sequences, experts through the exchange."""

from __future__ import annotations

import torch

from elastic_ep.model.attention import KVCache, attention
from elastic_ep.model.batch import Batch, CacheLayout
from elastic_ep.model.layers import RmsNorm, Rope, linear
from elastic_ep.model.moe import Carrier, moe
from elastic_ep.model.routing_table import RoutingTable
from elastic_ep.model.weights import Weights


class Qwen3Moe:
    """The forward pass. Every call performs two exchange operations a layer.

    `loads` [layers][slots]: the rows that each slot computes are added to it.
    """

    def __init__(
        self,
        weights: Weights,
        layout: CacheLayout,
        max_len: int,
        device: torch.device,
        loads: list[list[int]],
    ) -> None:
        self._loads = loads
        self._weights = weights
        self._layout = layout
        self.config = config = weights.config
        self.cache = KVCache(config, layout, device)
        self.routing = RoutingTable(config, device)
        self._rope = Rope(config.head_dim, config.rope_theta, max_len, device)
        self._norm = RmsNorm(config.rms_norm_eps, device)
        self._nothing = torch.empty(0, config.hidden_size, device=device)

    def forward(self, batch: Batch, exchange: Carrier) -> torch.Tensor:
        """Logits [R padded, V] float32 of the batch's logit rows. Writes the batch's keys and values."""
        config, count = self.config, batch.num_tokens
        rope = (self._rope, *self._rope.at(batch.positions))
        norm = self._norm
        x = self._weights.embed.index_select(0, batch.tokens)
        for index, layer in enumerate(self._weights.layers):
            h = norm(x, layer.input_norm)
            x += attention(h, layer, self.cache.layers[index], batch, config, self._layout, norm, rope)
            h = norm(x, layer.post_norm)
            x[:count] += moe(
                h, count, layer, self.routing.physical[index], exchange, config, self._loads[index]
            )
        if len(batch.logit_rows) == 0:
            return x.new_empty(0, config.vocab_size)
        last = norm(x.index_select(0, batch.logit_rows), self._weights.final_norm)
        return linear(last, self._weights.lm_head)

    def forward_idle(self, exchange: Carrier) -> None:
        """No tokens of our own: serve this rank's experts to the others."""
        for index, layer in enumerate(self._weights.layers):
            moe(
                self._nothing,
                0,
                layer,
                self.routing.physical[index],
                exchange,
                self.config,
                self._loads[index],
            )
