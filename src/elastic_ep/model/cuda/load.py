"""The rows that this rank's experts compute, counted on the device and read at a boundary now and then."""

from __future__ import annotations

import torch

from elastic_ep.model.expert_load import ExpertLoad
from elastic_ep.placement import Placement


class DeviceLoad(ExpertLoad):
    """`counts` [layers, slots] int32. Reading it waits for the device: every hundred steps, not every step."""

    def __init__(self, placement: Placement, rank: int, counts: torch.Tensor) -> None:
        super().__init__(placement, rank)
        self._counts = counts

    def _settle(self) -> None:
        for by_slot, counted in zip(self.by_slot, self._counts.tolist(), strict=True):
            by_slot[:] = counted
        self._counts.zero_()
        super()._settle()
