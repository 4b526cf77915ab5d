"""The forward pass of every family, over any backend's operations."""

from __future__ import annotations

from typing import Generic

import torch

from elastic_ep.engine.interrupted import CountedCarrier
from elastic_ep.engine.ops import Carrier, Ops, StepT
from elastic_ep.weights.bank import Weights


class Transformer(Generic[StepT]):
    """Paged attention on this rank's own sequences, experts through the exchange: two operations of it a layer."""

    def __init__(self, weights: Weights, ops: Ops[StepT]) -> None:
        self._weights = weights
        self._ops = ops

    def forward(self, step: StepT, exchange: Carrier) -> torch.Tensor:
        """Logits [S, V] float32 of what the step samples from. Writes the step's keys and values."""
        ops, layers = self._ops, self._weights.layers
        ops.begin(step)
        h, x = ops.add_norm(ops.embed(self._weights.embed), None, layers[0]["input_norm"])
        for index, layer in enumerate(layers):
            h, x = ops.add_norm(self._attention(h, index), x, layer["post_norm"])
            last = index + 1 == len(layers)
            following = self._weights.final_norm if last else layers[index + 1]["input_norm"]
            h, x = ops.add_norm(self._mixture(h, index, exchange), x, following)
        return ops.logits(h, self._weights.lm_head)

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
            carrier.give_back(self._ops.experts(carrier.received, self._weights.layers[first], first))
        self._serve(nothing, first + dispatched, carrier)

    def _serve(self, nothing: torch.Tensor, first: int, exchange: Carrier) -> None:
        """From layer `first` on."""
        for index in range(first, len(self._weights.layers)):
            self._mixture(nothing, index, exchange)

    def _attention(self, h: torch.Tensor, index: int) -> torch.Tensor:
        ops, layer = self._ops, self._weights.layers[index]
        queries = ops.rope_and_write(ops.linear(h, layer["qkv"]), layer, index)
        return ops.linear(ops.attend(queries, index), layer["out"])

    def _mixture(self, h: torch.Tensor, index: int, exchange: Carrier) -> torch.Tensor:
        ops, layer = self._ops, self._weights.layers[index]
        chosen, weights = ops.gate(h, layer, index)
        received = exchange.dispatch(ops.tokens(h), chosen)
        return exchange.combine(ops.experts(received, layer, index), weights)
