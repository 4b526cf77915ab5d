"""The forward pass of every family, over any backend's operations."""

from __future__ import annotations

from typing import Generic

import torch

from elastic_ep.engine.interrupted import CountedCarrier
from elastic_ep.engine.ops import Carrier, Ops, StepT
from elastic_ep.weights.bank import Parts, Weights


class Transformer(Generic[StepT]):
    """Paged attention on this rank's own sequences, experts through the exchange: two operations of it a mixture."""

    def __init__(self, weights: Weights, ops: Ops[StepT]) -> None:
        self._weights = weights
        self._ops = ops
        self._mixture_of = {index: mixture for mixture, index in enumerate(weights.spec.mixtures)}
        """Of the layers that mix experts: the how manieth."""

    def forward(self, step: StepT, exchange: Carrier) -> torch.Tensor:
        """Logits [S, V] float32 of what the step samples from. Writes the step's keys and values."""
        ops, layers, outside = self._ops, self._weights.layers, self._weights.outside
        ops.begin(step)
        h, x = ops.add_norm(ops.embed(self._weights.embed), None, layers[0], "input_norm")
        for index, layer in enumerate(layers):
            h, x = ops.add_norm(self._attention(h, index), x, layer, "post_norm")
            branch = self._feed_forward(h, index, exchange)
            if index + 1 == len(layers):
                h, x = ops.add_norm(branch, x, outside, "final_norm")
            else:
                h, x = ops.add_norm(branch, x, layers[index + 1], "input_norm")
        return ops.logits(h, outside)

    def forward_idle(self, exchange: Carrier) -> None:
        """No tokens of our own: serve this rank's experts to the others."""
        self._ops.begin(None)
        self._serve(self._weights.embed[:0], 0, exchange)

    def complete(self, step: StepT | None, nothing: torch.Tensor, carrier: CountedCarrier) -> None:
        """The rest of a step that `forward` has begun, as one of no tokens, whose hidden states are `nothing`.

        Raises BrokenStep, and what the experts raise.
        """
        first, dispatched = divmod(carrier.performed, 2)
        self._ops.begin(step)
        if dispatched:
            assert carrier.received is not None
            carrier.give_back(self._ops.experts(carrier.received, self._weights.mixture(first), first))
        self._serve(nothing, first + dispatched, carrier)

    def _serve(self, nothing: torch.Tensor, first: int, exchange: Carrier) -> None:
        """From mixture `first` on."""
        for mixture in range(first, len(self._mixture_of)):
            self._mix(nothing, self._weights.mixture(mixture), mixture, exchange)

    def _attention(self, h: torch.Tensor, index: int) -> torch.Tensor:
        ops, layer = self._ops, self._weights.layers[index]
        return ops.linear(ops.attend(ops.project(h, layer, index), layer, index), layer, "out")

    def _feed_forward(self, h: torch.Tensor, index: int, exchange: Carrier) -> torch.Tensor:
        ops, layer = self._ops, self._weights.layers[index]
        mixture = self._mixture_of.get(index)
        if mixture is None:
            return ops.feed_forward(h, layer)
        return ops.add_shared(self._mix(h, layer, mixture, exchange), h, layer, mixture)

    def _mix(self, h: torch.Tensor, layer: Parts, mixture: int, exchange: Carrier) -> torch.Tensor:
        chosen, weights = self._ops.gate(h, layer, mixture)
        rows, weights = self._ops.rows(h, weights, mixture)
        received = exchange.dispatch(rows, chosen)
        return exchange.combine(self._ops.experts(received, layer, mixture), weights)
