"""A group of any size for the page: ranks that live, die and come back by dice, without processes."""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from dataclasses import replace

from elastic_ep.group.history import GROUP, HOST
from elastic_ep.group.metrics import Metrics
from elastic_ep.group.port import (
    Draining,
    EngineStatus,
    FaultToleranceStatus,
    Killing,
    KVPages,
    Layer,
    Load,
    Loss,
)
from elastic_ep.placement import Placement, launch_placement
from tests.gateway.fakes import FakeBackend

COMING_BACK = ("Launching", "InitCUDA", "InitDist", "Joining", "Serving")


class SimulatedGroup(FakeBackend):
    def __init__(self, ranks: int, experts: int = 128, layers: int = 12, seed: int = 0) -> None:
        super().__init__()
        self.dice = random.Random(seed)
        self.placement: Placement = launch_placement(ranks, layers, experts, experts)
        self.step = 0
        self.epoch = 1
        pages = KVPages(4096, 900, 2100, 3000, 3000 << 16)
        self.engines = tuple(
            EngineStatus(rank, "healthy", "Serving", 1, 1000 + rank, 12, 0, "", kv_pages=pages)
            for rank in range(ranks)
        )
        self.history.moved(HOST, 0, "Ready")
        self.history.moved(GROUP, 0, "Serving")
        for rank in range(ranks):
            self.history.moved(rank, 1, "Serving")
        self._lost: deque[tuple[int, int]] = deque()

    def status(self) -> FaultToleranceStatus:
        away = sum(engine.state != "Serving" for engine in self.engines)
        return FaultToleranceStatus(
            "Degraded" if away else "Serving", self.epoch, self.step, 0 if away else 1, self.engines
        )

    def load(self) -> Load:
        return Load(sum(engine.running for engine in self.engines), 3)

    def placement_version(self) -> int:
        return self.placement.version

    async def layer(self, layer: int) -> Layer | None:
        if not 0 <= layer < len(self.placement.slots):
            return None
        ranks = [engine.id for engine in self.engines if engine.state == "Serving"]
        least = tuple(min(self.placement.copies(each, ranks)) for each in range(len(self.placement.slots)))
        shape = (self.placement.num_experts, self.placement.slots_per_rank)
        return Layer(self.placement.version, layer, *shape, self.placement.slots[layer], least)

    def change(self, rank: int, state: str, incarnation: int | None = None) -> None:
        engine = self.engines[rank]
        status = {"Serving": "healthy", "Failed": "dead"}.get(state, "unhealthy")
        changed = replace(engine, state=state, status=status, incarnation=incarnation or engine.incarnation)
        self.engines = (*self.engines[:rank], changed, *self.engines[rank + 1 :])
        self.history.moved(rank, changed.incarnation, state)

    def kill(self, rank: int, incarnation: int) -> Killing:
        engine = self.engines[rank]
        killed = engine.incarnation == incarnation and engine.state == "Serving"
        if killed:
            self.lose(rank)
        return Killing(killed, engine.incarnation)

    def drain(self, rank: int, patience_s: float) -> Draining:
        self.change(rank, "Draining")
        return super().drain(rank, patience_s)

    def lose(self, rank: int) -> None:
        incarnation = self.engines[rank].incarnation
        at_ms, at_ns = time.time_ns() // 10**6, time.monotonic_ns()
        stall_s = self.dice.uniform(0.004, 0.06)
        why = "killed by signal 9 (SIGKILL) from outside"
        loss = Loss(
            rank, incarnation, at_ms, at_ns, "Serving", "killed", why, 12, "0.1: 6, 1.1: 6", stall_s, None
        )
        self.epoch += 1
        self.change(rank, "Failed")
        self.history.lost(lambda: loss)

    async def live(self, metrics: Metrics, steps_per_s: float = 20.0, kills_per_s: float = 0.5) -> None:
        """Until it is cancelled: every rank's numbers change with each step, and some ranks die and come back."""
        returning: dict[int, int] = {}
        metrics.first_token(1, 0.05)
        while True:
            await asyncio.sleep(1 / steps_per_s)
            self.step += 1
            metrics.tokens(12 * len(self.engines), self.dice.uniform(0.03, 0.09))
            self.engines = tuple(
                replace(
                    engine,
                    running=12 + (self.step + engine.id) % 3,
                    kv_pages=replace(engine.kv_pages, held=900 + (self.step * 7 + engine.id * 13) % 400),
                )
                for engine in self.engines
            )
            if self.dice.random() < kills_per_s / steps_per_s:
                rank = self.dice.randrange(len(self.engines))
                if rank not in returning:
                    self.lose(rank)
                    returning[rank] = 0
            for rank, place in list(returning.items()):
                if self.dice.random() < 0.2:
                    self.change(rank, COMING_BACK[place], self.engines[rank].incarnation + (place == 0))
                    returning[rank] = place + 1
                    if place + 1 == len(COMING_BACK):
                        self.epoch += 1
                        del returning[rank]
