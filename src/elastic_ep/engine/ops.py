"""What a forward pass is made of: the same verbs on every backend, each on what suits it."""

from __future__ import annotations

from typing import Protocol, TypeVar

import torch

from elastic_ep.engine.routing_table import RoutingTable
from elastic_ep.exchange.base import Received
from elastic_ep.weights.bank import Parts

StepT = TypeVar("StepT", contravariant=True)


class Carrier(Protocol):
    """The part of an `Exchange` that a layer uses."""

    def dispatch(self, x: torch.Tensor, physical_experts: torch.Tensor) -> Received: ...

    def combine(self, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor: ...


class Ops(Protocol[StepT]):
    """One rank's; forward thread only. R rows of tokens, padded to tiles; what a row gets does not depend on the others.

    `begin` says which step the calls after it belong to; None is one without tokens, which only mixes experts.
    """

    routing: RoutingTable

    def begin(self, step: StepT | None) -> None: ...

    def embed(self, table: torch.Tensor) -> torch.Tensor:
        """The step's tokens: [R, H]."""
        ...

    def add_norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """RMSNorm of x + residual, and that sum: [R, H] each. x may lack padding rows; `residual` may be overwritten."""
        ...

    def linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """x [R, in] @ weight [in, out]"""
        ...

    def rope_and_write(self, qkv: torch.Tensor, layer: Parts, index: int) -> torch.Tensor:
        """Queries, normed as the spec says and rotated; keys and values go to the cache of layer `index`."""
        ...

    def attend(self, queries: torch.Tensor, index: int) -> torch.Tensor:
        """[R, Hq D], of what `rope_and_write` returned, over all that the cache of layer `index` has of each sequence."""
        ...

    def gate(self, h: torch.Tensor, layer: Parts, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Physical experts of the step's tokens and their weights, [tokens, K] each."""
        ...

    def tokens(self, h: torch.Tensor) -> torch.Tensor:
        """What of h [R, H] is dispatched; as many rows as `gate` gives."""
        ...

    def experts(self, received: Received, layer: Parts, index: int) -> torch.Tensor:
        """Each slot's expert on its rows, shaped like `received.packed`. Counts the rows as the slots' load."""
        ...

    def logits(self, h: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        """[S, V] float32 of the rows that are sampled from."""
        ...
