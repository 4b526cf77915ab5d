"""Ends of an exchange that live in processes of their own, for tests that drive them all from one."""

from __future__ import annotations

import multiprocessing
import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch

from elastic_ep.exchange.base import ExchangeShape, Format, Received, Work
from elastic_ep.wire.messages import Member
from tests.exchange.rank_process import CONNECT, CONTROL, FORWARD, LANES, Failure, Opener, Sent, rank_main
from tests.kit.bound import tied

START_S = 180.0
"""Mooncake compiles its kernels when the first process of a machine warms up."""
CALL_S = 40.0
"""Longer than Mooncake's kernels wait for a peer."""
END_S = 10.0


class ProcessGone(Exception):
    """A rank process died, or owes an answer since long ago."""


class RankProcess:
    """One rank process, ready for use. Raises what its warm-up raised."""

    def __init__(self, opener: Opener, warm_up: Callable[[], None], environment: Mapping[str, str]) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "elastic_ep.exchange.shm"])
        pipes = {lane: context.Pipe() for lane in LANES}
        theirs = {lane: pair[1] for lane, pair in pipes.items()}
        self._process = context.Process(
            target=tied, args=(rank_main, theirs, opener, warm_up, environment), daemon=True
        )
        self._process.start()
        for pipe in theirs.values():
            pipe.close()
        self._pipes = {lane: pair[0] for lane, pair in pipes.items()}
        self._locks = {lane: threading.Lock() for lane in LANES}
        self.broken = False
        """An answer is owed that nobody will take, or the process is dead."""
        try:
            self._answer(FORWARD, "start", START_S)
        except BaseException:
            self.kill()
            raise

    @property
    def pid(self) -> int | None:
        return self._process.pid

    def call(self, lane: str, name: str, *arguments: Any) -> Any:
        """Calls of one lane take turns. An error there is raised here, with its traceback as a note."""
        with self._locks[lane]:
            if self.broken:
                raise ProcessGone(f"process {self.pid} was given up before {name!r}")
            try:
                self._pipes[lane].send((name, arguments))
            except OSError:
                raise self._gone(name) from None
            return self._answer(lane, name, CALL_S)

    def _answer(self, lane: str, name: str, deadline_s: float) -> Any:
        pipe = self._pipes[lane]
        try:
            if not pipe.poll(deadline_s):
                self.broken = True
                raise TimeoutError(f"process {self.pid} has not done {name!r} in {deadline_s:.0f} s")
            answer = pipe.recv()
        except (EOFError, ConnectionError):
            raise self._gone(name) from None
        if isinstance(answer, Failure):
            answer.error.add_note(f"In rank process {self.pid}, {name!r}:\n{answer.trace}")
            raise answer.error
        return answer

    def _gone(self, name: str) -> ProcessGone:
        self.broken = True
        self._process.join(END_S)
        return ProcessGone(f"process {self.pid} died ({self._process.exitcode}) under {name!r}")

    def hang_up(self) -> None:
        """It ends by itself, soon."""
        self._pipes[CONTROL].close()

    def join(self) -> None:
        self._process.join(END_S)

    def kill(self) -> None:
        self._process.kill()
        self._process.join(END_S)


def no_warm_up() -> None:
    pass


@contextmanager
def no_environment() -> Iterator[Mapping[str, str]]:
    yield {}


class Pool:
    """Rank processes, costly to start: an end borrows one. `around` is entered before the first, left after the last."""

    def __init__(
        self,
        opener: Opener,
        warm_up: Callable[[], None] = no_warm_up,
        around: Callable[[], AbstractContextManager[Mapping[str, str]]] = no_environment,
    ) -> None:
        self._opener = opener
        self._warm_up = warm_up
        self._around = around
        self._lock = threading.Lock()
        self._stack = ExitStack()
        self._environment: Mapping[str, str] | None = None
        self._idle: list[RankProcess] = []
        self._all: list[RankProcess] = []

    def take(self) -> RankProcess:
        with self._lock:
            if self._environment is None:
                self._environment = self._stack.enter_context(self._around())
            if self._idle:
                return self._idle.pop()
        process = RankProcess(self._opener, self._warm_up, self._environment)
        self._all.append(process)
        return process

    def give(self, process: RankProcess) -> None:
        """Its end is closed."""
        with self._lock:
            self._idle.append(process)

    def discard(self, process: RankProcess) -> None:
        """Its end could not be closed. The idle ones go too: processes that share a GPU may share its faults."""
        with self._lock:
            faulty, self._idle = [process, *self._idle], []
        for one in faulty:
            one.kill()

    def close(self) -> None:
        """May be used again."""
        for process in self._idle:
            process.hang_up()
        for process in self._idle:
            process.join()
        for process in self._all:
            process.kill()
        self._idle, self._all, self._environment = [], [], None
        self._stack.close()


class RemoteExchange:
    """`Exchange` by calls to a process of `pool`. At this end tensors are on the host, of `format`'s types."""

    def __init__(
        self, pool: Pool, shape: ExchangeShape, member: Member, place: str, ends: dict[Member, RemoteExchange]
    ) -> None:
        """`ends` are all of the group."""
        self._pool = pool
        self._member = member
        self._ends = ends
        self._closed = False
        self.process = pool.take()
        try:
            self.format: Format = self.process.call(FORWARD, "open", shape, member, place)
        except BaseException:
            pool.discard(self.process)
            raise
        ends[member] = self

    @property
    def waiting_for(self) -> int | None:
        rank: int | None = self.process.call(CONTROL, "waiting_for")
        return rank

    @property
    def operations(self) -> int:
        return int(self.process.call(CONTROL, "operations"))

    def connect(self, member: Member) -> None:
        """The other side is made to connect at the same time: in a real group it is told to, and both wait."""
        sides = [(self, member)]
        if member in self._ends and member != self._member:
            sides.append((self._ends[member], self._member))
        with ThreadPoolExecutor() as threads:
            for call in [threads.submit(end.process.call, CONNECT, "connect", peer) for end, peer in sides]:
                call.result()

    def activate(self, member: Member) -> None:
        self.process.call(FORWARD, "activate", member)

    def mask(self, member: Member) -> None:
        self.process.call(CONTROL, "mask", member)

    def begin_step(self, step: int) -> None:
        self.process.call(FORWARD, "begin_step", step)

    def dispatch(self, x: torch.Tensor, physical_experts: torch.Tensor) -> Received:
        packed, counts = self.process.call(FORWARD, "dispatch", Sent.of(x), Sent.of(physical_experts))
        return Received(packed.tensor(), counts.tensor())

    def combine(self, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        sent: Sent = self.process.call(FORWARD, "combine", Sent.of(y), Sent.of(weights))
        return sent.tensor()

    def end_step(self) -> frozenset[int]:
        lost: frozenset[int] = self.process.call(FORWARD, "end_step")
        return lost

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        if self.process.broken:
            self._pool.discard(self.process)
            return
        try:
            self.process.call(FORWARD, "close")
        except BaseException:
            self._pool.discard(self.process)
            raise
        self._pool.give(self.process)

    def abandon(self) -> None:
        """If it was not closed, its process is of no use any more."""
        if not self._closed:
            self._closed = True
            self._pool.discard(self.process)


class RemoteDeviceExchange(RemoteExchange):
    """`DeviceExchange`, as far as the contract needs it."""

    def route_to(self, ranks: Collection[int]) -> None:
        self.process.call(FORWARD, "route_to", ranks)

    def meet(self, work: Work) -> None:
        self.process.call(FORWARD, "meet", work)

    def work(self) -> Work:
        work: Work = self.process.call(FORWARD, "work")
        return work

    def read_masks(self) -> None:
        self.process.call(FORWARD, "read_masks")
