"""Experts on a processor: tile by tile, each slot's weights on the rows that came for it."""

from __future__ import annotations

import operator
from collections.abc import MutableSequence

import torch
from torch.nn import functional

from elastic_ep.engine.ops_cpu.layers import ROWS, by_element, linear
from elastic_ep.exchange.base import Received
from elastic_ep.models.spec import Clamped
from elastic_ep.weights.bank import Parts

_PARTS = ("gate_up", "gate_up_bias", "down", "down_bias")


def gated_experts(
    received: Received, layer: Parts, load: MutableSequence[int], activation: Clamped | None = None
) -> torch.Tensor:
    """Each slot's expert on its rows: [S, C, H], shaped like `received.packed`; rows beyond the counts are undefined.

    Of `layer` `gate_up` [S, H, 2 I] and `down` [S, I, H], and `gate_up_bias` [S, 2 I] and `down_bias` [S, H] if there.
    The counts are added to `load` [S]. Every product has the shape of one tile, so it does not matter which slot or
    which row a token got.
    """
    packed = received.packed
    counts: list[int] = received.counts.tolist()
    load[:] = map(operator.add, load, counts)
    parts = {name: layer[name] for name in _PARTS if name in layer}
    y = torch.empty_like(packed)
    for start in range(0, max(counts, default=0), ROWS):
        tile = slice(start, start + ROWS)
        busy = [slot for slot, count in enumerate(counts) if count > start]
        if 2 * len(busy) > len(counts):
            y[:, tile] = _expert(packed[:, tile], parts, activation)
            continue
        for slot in busy:
            one = slice(slot, slot + 1)
            own = {name: part[one] for name, part in parts.items()}
            y[one, tile] = _expert(packed[one, tile], own, activation)
    return y


def feed_forward(x: torch.Tensor, layer: Parts, prefix: str = "") -> torch.Tensor:
    """A gated FFN of everybody's on x [R, H], R a multiple of `ROWS`; `prefix` comes before its parameters' names."""

    def product(x: torch.Tensor, name: str) -> torch.Tensor:
        return linear(x, layer[prefix + name], layer.get(f"{prefix}{name}_bias"))

    return product(_activated(product(x, "gate_up"), None), "down")


def _expert(x: torch.Tensor, parts: Parts, activation: Clamped | None) -> torch.Tensor:
    """x [S, ROWS, H]"""

    def product(x: torch.Tensor, name: str) -> torch.Tensor:
        y, bias = torch.bmm(x, parts[name]), parts.get(f"{name}_bias")
        return y if bias is None else y.add_(bias.unsqueeze(1))

    return product(_activated(product(x, "gate_up"), activation), "down")


def _activated(gate_up: torch.Tensor, activation: Clamped | None) -> torch.Tensor:
    gated, up = gate_up.chunk(2, dim=-1)
    if activation is None:
        return functional.silu(gated).mul_(up)
    gated = gated.clamp(max=activation.limit)
    up = up.clamp(-activation.limit, activation.limit)
    return by_element(torch.sigmoid, gated * activation.alpha).mul_(gated).mul_(up + 1)
