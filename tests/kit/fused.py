"""The C++ engine in one process: a rank whose only peer is itself."""

from __future__ import annotations

import os

import pytest
import torch

from elastic_ep.config import EngineLimits
from elastic_ep.engine.ops_cpu.fused_runner import FusedRunner
from elastic_ep.engine.step_runner import NO_SHELF, StreamMemory
from elastic_ep.exchange.base import ExchangeShape
from elastic_ep.exchange.fused import FusedExchange
from elastic_ep.exchange.windows import Windows
from elastic_ep.fused.library import Unavailable, best_build, load
from elastic_ep.placement import launch_placement
from elastic_ep.weights.bank import Weights
from elastic_ep.wire.messages import Member


def build() -> str:
    """ "" if this machine has none."""
    try:
        return best_build()
    except Unavailable:
        return ""


def needs_fused() -> pytest.MarkDecorator:
    try:
        best_build()
    except Unavailable as reason:
        return pytest.mark.skipif(True, reason=f"the engine in C++: {reason}")
    return pytest.mark.skipif(False, reason="")


class FusedAlone(FusedExchange):
    """`poison` as in `SoloExchange`. `garbage`: what the experts of the first layer return in the next step is NaN."""

    def __init__(self, shape: ExchangeShape, weights: Weights, name: str) -> None:
        fd = Windows.create(shape)
        try:
            super().__init__(fd, shape, Member(0, 1), load(name))
        finally:
            os.close(fd)
        self.poison: frozenset[int] = frozenset()
        self.garbage = False
        self._down = weights.layers[0]["down"]
        self._good = self._down.clone()

    def begin_step(self, step: int) -> None:
        super().begin_step(step)
        self._down.fill_(torch.nan) if self.garbage else self._down.copy_(self._good)

    def end_step(self) -> frozenset[int]:
        assert not super().end_step()
        poison, self.poison, self.garbage = self.poison, frozenset(), False
        self._down.copy_(self._good)
        return poison


def fused_runner(
    weights: Weights, limits: EngineLimits, name: str = "", memory: StreamMemory = NO_SHELF
) -> tuple[FusedRunner, FusedAlone]:
    """With the best build, or the one of that name."""
    spec, name = weights.spec, name or best_build()
    placement = launch_placement(1, spec.moe_layers, spec.moe.experts, 0)
    shape = spec.exchange_shape(limits.max_num_batched_tokens, placement)
    exchange = FusedAlone(shape, weights, name)
    return FusedRunner(load(name), limits, weights, placement, 0, exchange, memory), exchange
