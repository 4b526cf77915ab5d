"""A step whose computation raised is completed all the same: its peers count on every operation of this rank.

They also count on its experts: what they sent in the operation in progress, and send in those that follow, is computed
as ever. Only the rank's own tokens drop out.
"""

from __future__ import annotations

import torch

from elastic_ep.engine.ops import Carrier
from elastic_ep.exchange.base import Received


class BrokenStep(RuntimeError):
    """The step cannot be completed: this rank is of no use to its peers."""


class CountedCarrier:
    """Passes operations on to `carrier`, and knows how far a step has come.

    HAZARD: an operation that raises may have been performed or not, so after it nobody knows which is next: then
    `performed` raises BrokenStep.
    """

    __slots__ = ("_carrier", "_chosen", "_entered", "_performed", "received")

    def __init__(self, carrier: Carrier) -> None:
        self._carrier = carrier
        self._entered = self._performed = 0
        self._chosen: torch.Tensor | None = None
        self.received: Received | None = None
        """What the last dispatch gave."""

    def begin(self) -> None:
        self._entered = self._performed = 0

    @property
    def performed(self) -> int:
        """Operations of the step so far. Raises BrokenStep."""
        if self._entered != self._performed:
            raise BrokenStep("an exchange operation has failed")
        return self._performed

    def dispatch(self, x: torch.Tensor, physical_experts: torch.Tensor) -> Received:
        self._entered += 1
        self.received = self._carrier.dispatch(x, physical_experts)
        self._chosen = physical_experts
        self._performed += 1
        return self.received

    def combine(self, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        self._entered += 1
        mixture = self._carrier.combine(y, weights)
        self._performed += 1
        return mixture

    def give_back(self, y: torch.Tensor) -> None:
        """The combine that answers the last dispatch, for the peers alone."""
        assert self._chosen is not None
        weights = torch.zeros(self._chosen.shape, dtype=torch.float32, device=self._chosen.device)
        self.combine(y, weights)
