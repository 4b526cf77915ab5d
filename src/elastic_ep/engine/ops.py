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
        self, x: torch.Tensor, residual: torch.Tensor | None, parts: Parts, name: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm `name` of x + residual, and that sum: [R, H] each.

        x may lack padding rows; `residual` may be overwritten.
        """
        ...

    def linear(self, x: torch.Tensor, parts: Parts, name: str) -> torch.Tensor:
        """x [R, in] @ the matrix `name` [in, out], and its bias if it has one."""
        ...

    def project(self, h: torch.Tensor, layer: Parts, index: int) -> torch.Tensor:
        """What `attend` takes: queries, normed and rotated as the spec says. What a token is to be remembered by goes to
        the cache of layer `index`.
        """
        ...

    def attend(self, queries: torch.Tensor, layer: Parts, index: int) -> torch.Tensor:
        """[R, Hq Dv], of what `project` returned, over what layer `index` sees of each sequence's cache."""
        ...

    def feed_forward(self, h: torch.Tensor, layer: Parts) -> torch.Tensor:
        """[R, H] of a layer without experts."""
        ...

    def gate(self, h: torch.Tensor, layer: Parts, mixture: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Physical experts of the step's tokens and their weights, [tokens, K] each, in a layer that mixes experts: the
        `mixture`th of those.
        """
        ...

    def rows(self, h: torch.Tensor, weights: torch.Tensor, mixture: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What of h [R, H] is dispatched, as many rows as `gate` gave `weights`, and by what the results are weighed."""
        ...

    def experts(self, received: Received, layer: Parts, mixture: int) -> torch.Tensor:
        """Each slot's expert on its rows, shaped like `received.packed`. Counts the rows as the slots' load."""
        ...

    def add_shared(self, mixed: torch.Tensor, h: torch.Tensor, layer: Parts, mixture: int) -> torch.Tensor:
        """`mixed`, which combine gave, and the shared expert's part of the same tokens, if there is one."""
        ...

    def logits(self, h: torch.Tensor, outside: Parts) -> torch.Tensor:
        """[S, V] float32 of the rows that are sampled from."""
        ...
