"""An exchange of one rank with itself, in plain torch, on any device: for tests, and where there is no Mooncake."""

from __future__ import annotations

from collections.abc import Collection

import torch

from elastic_ep.exchange.base import Format, Received, Work
from elastic_ep.wire.messages import Member


class SoloDeviceExchange:
    """`poison` names ranks that the next `end_step` reports as masked; that step's mixtures are NaN if `garbage`."""

    def __init__(self, slots: int, device: torch.device, rows: torch.dtype = torch.bfloat16) -> None:
        self.format = Format(device, rows, torch.int32, tile=None, ordered=True, zero_tail=False)
        self._slots = torch.arange(slots, device=device)
        self._device = device
        self._work = Work(0, 0)
        self.operations = 0
        self.poison: frozenset[int] = frozenset()
        self.garbage = False
        self.waiting_for: int | None = None

    def connect(self, member: Member) -> None:
        raise NotImplementedError

    activate = mask = connect

    def route_to(self, ranks: Collection[int]) -> None:
        pass

    def meet(self, work: Work) -> None:
        self._work = work

    def work(self) -> Work:
        return self._work

    def read_masks(self) -> None:
        pass

    def begin_step(self, step: int) -> None:
        pass

    def dispatch(self, x: torch.Tensor, physical_experts: torch.Tensor) -> Received:
        self.operations += 1
        tokens, top_k = physical_experts.shape
        slot = physical_experts.reshape(-1)
        mine = slot[:, None] == self._slots
        place = (mine.cumsum(0) - 1).gather(1, slot.clamp(min=0)[:, None]).squeeze(1)
        waste = len(self._slots) * tokens
        self._target = torch.where(slot >= 0, slot * tokens + place, waste)
        packed = x.new_full((waste + 1, x.shape[1]), float("nan"))  # unused rows must not matter
        packed[self._target] = x.repeat_interleave(top_k, dim=0)
        return Received(packed[:-1].view(len(self._slots), tokens, -1), mine.sum(0, dtype=torch.int32))

    def combine(self, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        self.operations += 1
        rows = torch.cat((y.reshape(-1, y.shape[2]), y.new_zeros(1, y.shape[2])))[self._target]
        rows = rows.view(*weights.shape, -1).float()
        out = torch.zeros_like(rows[:, 0])
        for k in range(weights.shape[1]):
            out += weights[:, k, None] * rows[:, k]
        return (out * float("nan") if self.garbage else out).to(y.dtype)

    def end_step(self) -> frozenset[int]:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        poison, self.poison, self.garbage = self.poison, frozenset(), False
        return poison

    def close(self) -> None:
        pass
