"""The rows that this rank's experts compute, counted on the device and read at a boundary now and then."""

from __future__ import annotations

import torch

from elastic_ep.engine.expert_load import ExpertLoad
from elastic_ep.placement import Placement


class DeviceLoad(ExpertLoad):
    """`counts` [layers, slots] int32. Reading it waits for the device: every hundred steps, not every step.

    After a `cut` it waits for what was launched before that alone.
    """

    def __init__(self, placement: Placement, rank: int, counts: torch.Tensor) -> None:
        super().__init__(placement, rank)
        self._counts = counts
        pinned = counts.device.type == "cuda"
        self._host = torch.zeros(counts.shape, dtype=counts.dtype, pin_memory=pinned)
        self._copied = torch.cuda.Event() if pinned else None
        self._cut = False

    def cut(self) -> None:
        self._settle_cut()
        self._host.copy_(self._counts, non_blocking=True)
        self._counts.zero_()
        if self._copied is not None:
            self._copied.record()
        self._cut = True

    def adopt(self, placement: Placement) -> None:
        self._settle_cut()  # what was counted since belongs to the placement before, too
        super().adopt(placement)

    def _settle_cut(self) -> None:
        if self._cut:
            self._settle()

    def _settle(self) -> None:
        if not self._cut:
            self.cut()
        self._cut = False
        if self._copied is not None:
            self._copied.synchronize()
        for by_slot, counted in zip(self.by_slot, self._host.tolist(), strict=True):
            by_slot[:] = counted
        super()._settle()
