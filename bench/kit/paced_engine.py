"""A rank whose device is a clock: everything of a rank is real but the model, whose steps take a set time.

So the control plane can be watched at the pace of a GPU on a machine that has none. A step ends when its time is over
and every peer that takes part has begun it; a dead peer is waited for until it is masked, as on a device. Tokens are a
function of (length of the prompt, choice, position), so texts of a disturbed run can be compared.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Sequence as Seq
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from elastic_ep.config import RankConfig
from elastic_ep.engine.expert_load import ExpertLoad
from elastic_ep.engine.routing_table import RoutingTable
from elastic_ep.engine.sampler import Sampled
from elastic_ep.engine.scheduler import Chunk, Sequence
from elastic_ep.engine.step_runner import StepRunner
from elastic_ep.exchange.base import Received
from elastic_ep.exchange.peers import Peers
from elastic_ep.exchange.pull import HOST_FORMAT
from elastic_ep.exchange.step_barrier import StepBarrier
from elastic_ep.host.fork_messages import SharedFiles
from elastic_ep.models.registry import load_spec
from elastic_ep.placement import EMPTY
from elastic_ep.rank.process import RankProcess, live
from elastic_ep.wire.messages import Member
from elastic_ep.wire.slot_messages import SlotSum

STEP_MS = "PACED_STEP_MS"
"""The environment variable that says how long a step takes."""
_POLL_S = 0.0001
_FIRST_TOKEN, _TOKENS = 100, 100


class PacedExchange:
    """`Exchange` without data: who takes part, who is masked, and when a step is over."""

    format = HOST_FORMAT

    def __init__(self, config: RankConfig, step_s: float, operations: int) -> None:
        self._peers = Peers(
            Member(config.rank, config.incarnation),
            config.placement.num_ranks,
            config.placement.slots_per_rank,
        )
        self._barrier = StepBarrier(Path(config.directory), config.placement.num_ranks, config.rank)
        self._step_s, self._per_step = step_s, operations
        self._masked = threading.Event()
        self._step, self._ends_s = -1, 0.0
        self.targets: frozenset[int] = frozenset()
        self.operations = 0

    @property
    def live(self) -> list[int]:
        return [rank for rank, live in enumerate(self._peers.live) if live]

    @property
    def waiting_for(self) -> int | None:
        return next((rank for rank in self.live if self._barrier.of(rank) < self._step), None)

    def connect(self, member: Member) -> None:
        pass

    def activate(self, member: Member) -> None:
        self._peers.activate(member)

    def mask(self, member: Member) -> None:
        self._peers.mask(member)
        self._masked.set()

    def begin_step(self, step: int) -> None:
        self._peers.begin_step()
        self._masked.clear()
        self._step = step
        self._barrier.say(step)

    def launch(self) -> None:
        self._ends_s = time.perf_counter() + self._step_s

    def dispatch(self, x: torch.Tensor, physical_experts: torch.Tensor) -> Received:
        raise NotImplementedError

    def combine(self, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def end_step(self) -> frozenset[int]:
        time.sleep(max(0.0, self._ends_s - time.perf_counter()))
        while self.waiting_for is not None:
            self._masked.wait(_POLL_S)
        self.operations += self._per_step
        return self._peers.end_step() | (self.targets - set(self.live))

    def close(self) -> None:
        pass


class PacedRunner(StepRunner):
    launches_ahead = True

    def __init__(self, config: RankConfig, step_s: float) -> None:
        spec = load_spec(Path(config.model))
        self._paced = PacedExchange(config, step_s, 2 * spec.moe_layers)
        weights: Any = SimpleNamespace(
            spec=spec, embed=torch.empty(0, device="meta")
        )  # nothing that peers could read
        super().__init__(
            config.limits,
            weights,
            config.placement,
            config.rank,
            self._paced,
            RoutingTable(spec.moe_layers, spec.moe.experts, torch.device("cpu")),
            ExpertLoad(config.placement, config.rank),
        )

    @property
    def exchange(self) -> PacedExchange:
        return self._paced

    def set_routing(self, active_ranks: Any, placement: Any = None) -> bool:
        covered = super().set_routing(active_ranks, placement)
        self._paced.targets = frozenset(active_ranks if covered else ())
        return covered

    def warm_up(self) -> None:
        pass

    def _launch(self, chunks: list[Chunk]) -> None:
        self._paced.launch()

    def _complete(self) -> None:
        pass

    def prove_well(self) -> None:
        pass

    def _discard(self) -> None:
        pass

    def _sample(self, sequences: Seq[Sequence]) -> list[Sampled]:
        return [
            Sampled(_FIRST_TOKEN + (7 * seq.prompt_len + 31 * seq.choice + len(seq.tokens)) % _TOKENS)
            for seq in sequences
        ]

    def copy_expert(self, layer: int, physical: int, logical: int) -> int:
        return 1 + logical

    def slot_sums(self) -> list[SlotSum]:
        first = self._rank * self.slots_per_rank
        return [
            SlotSum(layer, first + slot, 1 + logical)
            for layer in range(len(self._placement.slots))
            for slot, logical in enumerate(self._placement.on_rank(layer, self._rank))
            if logical != EMPTY
        ]


def build(config: RankConfig) -> tuple[StepRunner, PacedExchange]:
    runner = PacedRunner(config, float(os.environ[STEP_MS]) / 1000)
    return runner, runner.exchange


def main(config_json: str, files: SharedFiles, life_fd: int) -> int:
    """As `elastic_ep.rank.process.main`."""
    return live(RankProcess(RankConfig.from_json(config_json), files, life_fd, build=build))
