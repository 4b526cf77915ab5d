"""Several ends of an exchange, each driven by a thread of its own, and what they must compute."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from queue import SimpleQueue
from typing import Any, TypeGuard, TypeVar

import torch

from elastic_ep.exchange.base import (
    NO_EXPERT,
    DeviceExchange,
    Exchange,
    ExchangeShape,
    Format,
    Received,
    Work,
)
from elastic_ep.wire.messages import Member
from tests.exchange.hubs import Hub

DEADLINE_S = 30.0
_HOST = torch.device("cpu")
T = TypeVar("T")


@dataclass(frozen=True)
class Batch:
    """One rank's tokens in one layer: x [T, hidden], logical experts [T, top_k] or -1, weights [T, top_k]."""

    x: torch.Tensor
    experts: torch.Tensor
    weights: torch.Tensor


def random_batch(shape: ExchangeShape, tokens: int, seed: int, nowhere: float = 0.1) -> Batch:
    """As many logical experts as there are slots, each once a token; `nowhere` is the share of entries without one."""
    random = torch.Generator().manual_seed(seed)
    size = (tokens, shape.top_k)
    order = torch.rand(tokens, shape.num_ranks * shape.slots_per_rank, generator=random).argsort(dim=1)
    experts = order[:, : shape.top_k].clone()
    experts[torch.rand(size, generator=random) < nowhere] = NO_EXPERT
    return Batch(
        torch.randn(tokens, shape.hidden, generator=random), experts, torch.randn(size, generator=random)
    )


def apply_expert(logical: int, x: torch.Tensor) -> torch.Tensor:
    """Elementwise, so that a row's result cannot depend on the other rows.

    Products and sums only: when several threads are the first of their process to call torch.tanh at the same
    moment, one of them may get a result that is good to four digits only (seen in 7 of 3900 processes).
    """
    return x * (1.0 + 0.37 * logical) + 0.11 * logical


def reference(
    batch: Batch, missing: frozenset[int] = frozenset(), rows: torch.dtype = torch.float32
) -> torch.Tensor:
    """Token by token, without any exchange. The logical experts in `missing` contribute nothing.

    Inputs and results of experts are rounded to `rows`, but not the sum.
    """
    x = batch.x.to(rows).float()
    total = torch.zeros_like(x)
    for token in range(len(batch.x)):
        for k, logical in enumerate(batch.experts[token].tolist()):
            if logical != NO_EXPERT and logical not in missing:
                y = apply_expert(logical, x[token]).to(rows).float()
                total[token] += batch.weights[token, k] * y
    return total


def used(received: Received) -> torch.Tensor:
    """[slots, C]: whether a row holds something."""
    slots, capacity = received.packed.shape[:2]
    counts = received.counts.view(slots, -1)
    row = torch.arange(capacity // counts.shape[1])
    return (row < counts[:, :, None]).view(slots, capacity)


@dataclass(frozen=True)
class Routing:
    """`physical[logical]` is where an expert lives, one of `slots` of a rank."""

    physical: tuple[int, ...]
    slots: int

    @classmethod
    def plain(cls, shape: ExchangeShape) -> Routing:
        return cls(tuple(range(shape.num_ranks * shape.slots_per_rank)), shape.slots_per_rank)

    def route(self, experts: torch.Tensor) -> torch.Tensor:
        table = torch.tensor([*self.physical, NO_EXPERT])  # index -1 is the last entry
        return table[experts]

    def ranks(self, experts: Iterable[torch.Tensor]) -> set[int]:
        """Where tokens with these logical experts go."""
        return {
            physical // self.slots
            for some in experts
            for physical in self.route(some).unique().tolist()
            if physical != NO_EXPERT
        }

    def compute(self, received: Received, rank: int) -> torch.Tensor:
        """What this rank's experts make of their packed inputs, rounded once; NaN in the rows that hold nothing."""
        logical = {physical: expert for expert, physical in enumerate(self.physical)}
        y = torch.full_like(received.packed, float("nan"))
        for slot, rows in enumerate(used(received)):
            if rows.any():
                x = received.packed[slot, rows].float()
                y[slot, rows] = apply_expert(logical[rank * self.slots + slot], x).to(y.dtype)
        return y


def _is_on_device(exchange: Exchange) -> TypeGuard[DeviceExchange]:
    return hasattr(type(exchange), "meet")


def begin_step(exchange: Exchange, step: int, targets: Collection[int]) -> None:
    """Tokens of the step go to `targets` alone, which are ranks."""
    if not _is_on_device(exchange):
        exchange.begin_step(step)
        return
    exchange.route_to(targets)
    exchange.begin_step(step)
    exchange.meet(Work(0, 0))


@dataclass(frozen=True)
class StepResult:
    outputs: list[torch.Tensor]
    lost: frozenset[int]


def run_step(
    exchange: Exchange, rank: int, step: int, layers: list[Batch], routing: Routing, pause: Callable[[], None]
) -> StepResult:
    """All operations of one step; `pause` is called before each and before the end."""
    begin_step(exchange, step, routing.ranks(batch.experts for batch in layers))
    outputs = []
    for batch in layers:
        pause()
        received = exchange.dispatch(batch.x.to(exchange.format.rows), routing.route(batch.experts))
        pause()
        outputs.append(exchange.combine(routing.compute(received, rank), batch.weights))
    pause()
    return StepResult(outputs, exchange.end_step())


class Rank:
    """A thread that owns one end. Jobs run in order."""

    def __init__(self, member: Member, exchange: Exchange) -> None:
        self.member = member
        self.exchange = exchange
        self._jobs: SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name=f"rank {member}", daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()
        self._jobs.put((job, future))
        return future

    def step(
        self, step: int, layers: list[Batch], routing: Routing, pause: Callable[[], None] = lambda: None
    ) -> Future[StepResult]:
        return self.submit(lambda: run_step(self.exchange, self.member.rank, step, layers, routing, pause))

    def stop(self) -> None:
        self._jobs.put(None)
        self._thread.join(DEADLINE_S)
        assert not self._thread.is_alive(), f"{self.member} did not end"
        self.exchange.close()

    def _run(self) -> None:
        while (item := self._jobs.get()) is not None:
            job, future = item
            try:
                future.set_result(job())
            except BaseException as error:
                future.set_exception(error)


class Group:
    """Context manager: members that know each other. At its end everybody is masked, so no thread is stuck."""

    def __init__(self, hub: Hub, members: Iterable[Member]) -> None:
        self._hub = hub
        self.ranks: dict[int, Rank] = {}
        self._all: list[Rank] = []
        try:
            with ThreadPoolExecutor() as threads:
                for rank in threads.map(self._new, members):
                    self._know(rank)
            for rank in self.ranks.values():
                for other in self.ranks.values():
                    rank.exchange.connect(other.member)
                    rank.exchange.activate(other.member)
        except BaseException:
            hub.close()
            raise

    @property
    def format(self) -> Format:
        """But for its device it is that of all ends."""
        first, *others = (replace(rank.exchange.format, device=_HOST) for rank in self._all)
        assert all(other == first for other in others)
        return first

    def __enter__(self) -> Group:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            for rank in self._all:
                for other in self._all:
                    if other.member.rank != rank.member.rank:  # Mooncake refuses to mask its own rank
                        rank.exchange.mask(other.member)
            with ThreadPoolExecutor() as threads:
                list(threads.map(Rank.stop, self._all))
        finally:
            self._hub.close()

    def add(self, member: Member) -> Rank:
        """A new end, which nobody knows yet and which knows nobody."""
        rank = self._new(member)
        self._know(rank)
        return rank

    def _new(self, member: Member) -> Rank:
        return Rank(member, self._hub.end(member))

    def _know(self, rank: Rank) -> None:
        self.ranks[rank.member.rank] = rank
        self._all.append(rank)

    def step(
        self, step: int, layers: Mapping[int, list[Batch]], routing: Routing
    ) -> dict[int, Future[StepResult]]:
        return {rank: self.ranks[rank].step(step, batches, routing) for rank, batches in layers.items()}


def results(futures: Mapping[int, Future[StepResult]]) -> dict[int, StepResult]:
    return {rank: future.result(DEADLINE_S) for rank, future in futures.items()}


def until(condition: Callable[[], bool]) -> None:
    limit = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < limit, "it did not happen in time"
        time.sleep(0.0005)
