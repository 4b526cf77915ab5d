"""A rank in a process of its own, which can be killed at any moment or kills itself at a chosen one."""

from __future__ import annotations

import os
import signal
import threading
from dataclasses import dataclass, field
from enum import StrEnum
from multiprocessing.connection import Connection
from queue import SimpleQueue

import numpy as np
import torch

from elastic_ep.exchange.base import NO_EXPERT, ExchangeShape, Received
from elastic_ep.exchange.fused import FusedExchange
from elastic_ep.exchange.shm import ShmExchange
from elastic_ep.fused.library import best_build, load
from elastic_ep.wire.messages import Member
from tests.exchange.group import Batch, Routing, random_batch, reference, run_step

BATCHES = 5
"""Different batches a rank has; a step uses one of them."""
Expected = dict[tuple[int, frozenset[int]], torch.Tensor]
"""By batch, and the ranks that are gone."""


class Moment(StrEnum):
    """Where in an operation a rank dies."""

    HALF_WRITTEN = "half written"
    WRITTEN = "written, not posted"
    POSTED = "posted"


@dataclass(frozen=True)
class Death:
    """By its own hand, in operation `operation` (from 0) of step `step`."""

    step: int
    operation: int
    moment: Moment


@dataclass(frozen=True)
class Start:
    """Know these members; the steps begin at `step`."""

    members: tuple[Member, ...]
    death: Death | None = None


@dataclass(frozen=True)
class Run:
    """Perform steps `first` .. `last` - 1 and report."""

    first: int
    last: int


@dataclass(frozen=True)
class Lost:
    member: Member


@dataclass(frozen=True)
class Done:
    """Results that were wrong although their step was not poisoned; poisoned steps and by whom."""

    good: int
    wrong: tuple[int, ...] = ()
    poisoned: dict[int, frozenset[int]] = field(default_factory=dict)


class DyingShm(ShmExchange):
    """Kills its own process at the appointed moment."""

    death: Death | None = None
    step = -1
    performed = 0

    def begin_step(self, step: int) -> None:
        self.step, self.performed = step, 0
        super().begin_step(step)

    def _post(self) -> None:
        """An operation's data is written now; after this the others know."""
        death = self.death
        now = death is not None and (death.step, death.operation) == (self.step, self.performed)
        moment = death.moment if death is not None and now else None
        if moment is Moment.HALF_WRITTEN:
            self._scribble()
        if moment in (Moment.HALF_WRITTEN, Moment.WRITTEN):
            os.kill(os.getpid(), signal.SIGKILL)
        super()._post()
        if moment is Moment.POSTED:
            os.kill(os.getpid(), signal.SIGKILL)
        self.performed += 1

    def _scribble(self) -> None:
        """What a write that was cut short may look like, and worse."""
        if self.performed % 2 == 0:
            self._my_x[: len(self._my_x) // 2].fill(np.nan)
            self._my_experts[: len(self._my_experts) // 2] = (
                self.shape.num_ranks * self.shape.slots_per_rank - 1
            )
        else:
            self._boxes.view(np.float32).reshape(-1, self.shape.hidden)[self._target] = np.nan


class DyingFused(FusedExchange):
    """So does this. C++ cannot be stopped between two of its writes: the step in which it dies is performed by
    `DyingShm`, which writes the same into the same windows. Those who see it die are in C++.
    """

    def __init__(self, fd: int, shape: ExchangeShape, member: Member) -> None:
        super().__init__(fd, shape, member, load(best_build()))
        self.death: Death | None = None
        self._end = DyingShm(fd, shape, member)
        self._ends = False

    def activate(self, member: Member) -> None:
        super().activate(member)
        self._end.activate(member)

    def mask(self, member: Member) -> None:
        super().mask(member)
        self._end.mask(member)

    def begin_step(self, step: int) -> None:
        super().begin_step(step)
        self._ends = self.death is not None and self.death.step == step
        if self._ends:
            self._end.death = self.death
            self._end.begin_step(step)

    def dispatch(self, x: torch.Tensor, physical_experts: torch.Tensor) -> Received:
        if self._ends:
            return self._end.dispatch(x, physical_experts)
        return super().dispatch(x, physical_experts)

    def combine(self, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return self._end.combine(y, weights) if self._ends else super().combine(y, weights)


def rank_main(pipe: Connection, windows: str, shape: ExchangeShape, me: Member, *, fused: bool) -> None:
    """`windows` is the path of the shared memory."""
    torch.set_num_threads(1)
    fd = os.open(windows, os.O_RDWR)
    exchange = DyingFused(fd, shape, me) if fused else DyingShm(fd, shape, me)
    os.close(fd)
    work: SimpleQueue[Start | Run | None] = SimpleQueue()
    gone: set[int] = set(range(shape.num_ranks)) - {me.rank}

    def listen() -> None:
        """The control loop's part: masks take effect at once, whatever the other thread does."""
        while True:
            try:
                message = pipe.recv()
            except EOFError:
                message = None
            if isinstance(message, Lost):
                gone.add(message.member.rank)  # first, so that no step sends something to a masked rank
                exchange.mask(message.member)
            else:
                work.put(message)
                if message is None:
                    return

    threading.Thread(target=listen, daemon=True).start()
    batches = [random_batch(shape, shape.max_tokens, me.rank * BATCHES + seed) for seed in range(BATCHES)]
    expected: Expected = {}
    routing = Routing.plain(shape)
    while (message := work.get()) is not None:
        if isinstance(message, Start):
            for member in message.members:
                exchange.connect(member)
                exchange.activate(member)
                gone.discard(member.rank)
            exchange.death = message.death
            pipe.send(None)
        else:
            pipe.send(_run(exchange, message, batches, expected, routing, gone))


def _run(
    exchange: DyingShm | DyingFused,
    run: Run,
    batches: list[Batch],
    expected: Expected,
    routing: Routing,
    gone: set[int],
) -> Done:
    shape, rank = exchange.shape, exchange.member.rank
    good, wrong, poisoned = 0, [], {}
    for step in range(run.first, run.last):
        absent = frozenset(gone)
        batch = _route_around(batches[step % BATCHES], absent, shape)
        key = (step % BATCHES, absent)
        if key not in expected:
            expected[key] = reference(batch)
        result = run_step(
            exchange, rank, step, [batch] * (shape.operations_per_step // 2), routing, lambda: None
        )
        if result.lost:
            poisoned[step] = result.lost
        elif all(torch.equal(output, expected[key]) for output in result.outputs):
            good += 1
        else:
            wrong.append(step)
    return Done(good, tuple(wrong), poisoned)


def _route_around(batch: Batch, absent: frozenset[int], shape: ExchangeShape) -> Batch:
    experts = batch.experts.clone()
    for rank in absent:
        experts[experts // shape.slots_per_rank == rank] = NO_EXPERT
    return Batch(batch.x, experts, batch.weights)
