"""An exchange of one rank with itself that never waits for the device, and runners on it."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from unittest import mock

import torch

from elastic_ep.config import EngineLimits
from elastic_ep.exchange.base import Received
from elastic_ep.messages import Member
from elastic_ep.model.config import ModelConfig
from elastic_ep.model.cuda import runner as runner_module
from elastic_ep.model.cuda.runner import CudaRunner
from elastic_ep.model.sampler import Sampled, sample
from elastic_ep.model.scheduler import Sequence
from elastic_ep.model.weights import Weights, dummy_source
from elastic_ep.placement import launch_placement

from ..solo import TINY

Logits = dict[tuple[int, int], torch.Tensor]
"""By (request, number of known tokens)."""


class SoloDeviceExchange:
    """`poison` names ranks that the next `end_step` reports as masked; that step's mixtures are NaN if `garbage`."""

    def __init__(self, slots: int, device: torch.device) -> None:
        self._slots = torch.arange(slots, device=device)
        self._device = device
        self.operations = 0
        self.poison: frozenset[int] = frozenset()
        self.garbage = False
        self.waiting_for: int | None = None

    def connect(self, member: Member) -> None:
        raise NotImplementedError

    activate = mask = connect

    def route_to(self, ranks: Collection[int]) -> None:
        pass

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


def cuda_runner(
    device: torch.device,
    config: ModelConfig = TINY,
    limits: EngineLimits | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    graphs: bool = False,
) -> tuple[CudaRunner, SoloDeviceExchange]:
    placement = launch_placement(1, config.num_hidden_layers, config.num_experts, 0)
    weights = Weights(config, placement, 0, dummy_source(config, 0), device, dtype)
    exchange = SoloDeviceExchange(config.num_experts, device)
    limits = limits or EngineLimits(
        max_model_len=100, max_num_seqs=4, max_num_batched_tokens=24, num_pages=40
    )
    runner = CudaRunner(config, limits, weights, placement, 0, exchange, tile=4, graphs=graphs)
    return runner, exchange


@contextmanager
def recorded() -> Iterator[Logits]:
    """Of all that is sampled, greedy too."""
    seen: Logits = {}

    def recording(logits: torch.Tensor, sequences: list[Sequence]) -> list[Sampled]:
        for row, seq in zip(logits, sequences, strict=True):
            seen[seq.request_id, len(seq.tokens)] = row.clone()
        return sample(logits, sequences)

    with (
        mock.patch.object(runner_module, "sample", recording),
        mock.patch.object(runner_module, "is_plain_greedy", return_value=False),
    ):
        yield seen
