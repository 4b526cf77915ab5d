"""The MoE block: the gate picks experts, the exchange carries the rows to them and back."""

from __future__ import annotations

import operator
from typing import Protocol

import torch
from torch.nn import functional

from elastic_ep.exchange.base import Received
from elastic_ep.model.config import ModelConfig
from elastic_ep.model.layers import ROWS, linear
from elastic_ep.model.weights import LayerWeights


class Carrier(Protocol):
    """The part of an `Exchange` that a layer uses."""

    def dispatch(self, x: torch.Tensor, physical_experts: torch.Tensor) -> Received: ...

    def combine(self, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor: ...


def gate(
    x: torch.Tensor, weights: LayerWeights, physical: torch.Tensor, config: ModelConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """x [Tp, H] to physical experts [Tp, K] and their weights [Tp, K]; `physical` [E] is the layer's routing."""
    probabilities = torch.softmax(linear(x, weights.gate), dim=-1)
    chosen, logical = torch.topk(probabilities, config.num_experts_per_tok, dim=-1)
    if config.norm_topk_prob:
        chosen /= chosen.sum(dim=-1, keepdim=True)
    return torch.take(physical, logical), chosen


def experts(received: Received, weights: LayerWeights, load: list[int]) -> torch.Tensor:
    """Each slot's expert on its rows: [S, C, H], shaped like `received.packed`; rows beyond the counts are undefined.

    The counts are added to `load` [S]. Every product has the shape of one tile, so it does not matter which slot or
    which row a token got.
    """
    packed = received.packed
    counts: list[int] = received.counts.tolist()
    load[:] = map(operator.add, load, counts)
    y = torch.empty_like(packed)
    for start in range(0, max(counts, default=0), ROWS):
        tile = slice(start, start + ROWS)
        busy = [slot for slot, count in enumerate(counts) if count > start]
        if 2 * len(busy) > len(counts):
            y[:, tile] = _swiglu(packed[:, tile], weights.gate_up, weights.down)
            continue
        for slot in busy:
            one = slice(slot, slot + 1)
            y[one, tile] = _swiglu(packed[one, tile], weights.gate_up[one], weights.down[one])
    return y


def _swiglu(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """x [S, ROWS, H]"""
    gated, up = torch.bmm(x, gate_up).chunk(2, dim=-1)
    return torch.bmm(functional.silu(gated).mul_(up), down)


def moe(
    x: torch.Tensor,
    num_tokens: int,
    weights: LayerWeights,
    physical: torch.Tensor,
    exchange: Carrier,
    config: ModelConfig,
    load: list[int],
) -> torch.Tensor:
    """x [Tp, H], normed, of which the first `num_tokens` rows are real: their expert mixture [num_tokens, H].

    Exactly two exchange operations, also for no tokens at all.
    """
    if num_tokens == 0:
        chosen = torch.empty(0, config.num_experts_per_tok, dtype=torch.int64, device=x.device)
        mixing = torch.empty(0, config.num_experts_per_tok, device=x.device)
    else:
        chosen, mixing = gate(x, weights, physical, config)
    received = exchange.dispatch(x[:num_tokens], chosen[:num_tokens])
    return exchange.combine(experts(received, weights, load), mixing[:num_tokens])
