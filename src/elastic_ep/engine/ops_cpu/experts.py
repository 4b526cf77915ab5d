"""Experts on a processor: tile by tile, each slot's weights on the rows that came for it."""

from __future__ import annotations

import operator
from collections.abc import MutableSequence

import torch
from torch.nn import functional

from elastic_ep.engine.ops_cpu.layers import ROWS
from elastic_ep.exchange.base import Received


def swiglu_experts(
    received: Received, gate_up: torch.Tensor, down: torch.Tensor, load: MutableSequence[int]
) -> torch.Tensor:
    """Each slot's expert on its rows: [S, C, H], shaped like `received.packed`; rows beyond the counts are undefined.

    `gate_up` [S, H, 2 I], `down` [S, I, H]. The counts are added to `load` [S]. Every product has the shape of one tile,
    so it does not matter which slot or which row a token got.
    """
    packed = received.packed
    counts: list[int] = received.counts.tolist()
    load[:] = map(operator.add, load, counts)
    y = torch.empty_like(packed)
    for start in range(0, max(counts, default=0), ROWS):
        tile = slice(start, start + ROWS)
        busy = [slot for slot, count in enumerate(counts) if count > start]
        if 2 * len(busy) > len(counts):
            y[:, tile] = _swiglu(packed[:, tile], gate_up, down)
            continue
        for slot in busy:
            one = slice(slot, slot + 1)
            y[one, tile] = _swiglu(packed[one, tile], gate_up[one], down[one])
    return y


def _swiglu(x: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """x [S, ROWS, H]"""
    gated, up = torch.bmm(x, gate_up).chunk(2, dim=-1)
    return torch.bmm(functional.silu(gated).mul_(up), down)
