"""The kinds of exchange that the contract is for. A hub is what the ends of one group have in common."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Protocol

from hypothesis import Phase

from elastic_ep.exchange.base import Exchange, ExchangeShape
from elastic_ep.exchange.fused import FusedExchange
from elastic_ep.exchange.mooncake_needs import EXPERTS_MULTIPLE, HIDDEN_MULTIPLE
from elastic_ep.exchange.shm import ShmExchange
from elastic_ep.exchange.windows import Windows
from elastic_ep.fused.library import best_build, load
from elastic_ep.host.mps import PROGRAM, mps_daemon
from elastic_ep.wire.messages import Member
from tests.exchange.carriers import CarrierPair
from tests.exchange.on_device import (
    open_mooncake,
    open_peer_memory,
    warm_up_mooncake,
    warm_up_peer_memory,
)
from tests.exchange.remote import Pool, RemoteDeviceExchange, RemoteExchange
from tests.kit.loopback import LoopbackHub


class Hub(Protocol):
    def end(self, member: Member) -> Exchange: ...

    def close(self) -> None: ...


class Loopback(LoopbackHub):
    def close(self) -> None:
        pass


class Shm:
    """Windows with an end for each thread: to the windows a thread is as good as a process."""

    def __init__(self, shape: ExchangeShape) -> None:
        self.fd = Windows.create(shape)
        self._shape = shape

    def end(self, member: Member) -> Exchange:
        return ShmExchange(self.fd, self._shape, member)

    def close(self) -> None:
        os.close(self.fd)


class FusedShm(Shm):
    """Ends in C++."""

    def end(self, member: Member) -> Exchange:
        return FusedExchange(self.fd, self._shape, member, load(best_build()))


class TwoHosts:
    """Windows for each of two hosts, which have every other rank, and nothing between them but a carrier each."""

    def __init__(self, shape: ExchangeShape) -> None:
        self._shape = shape
        self._hosts = tuple(rank % 2 for rank in range(shape.num_ranks))
        self.pair = CarrierPair(shape, self._hosts)

    def end(self, member: Member) -> Exchange:
        if not 0 <= member.rank < self._shape.num_ranks:
            return ShmExchange(self.pair.fds[0], self._shape, member)  # refuses it
        return self.open(self.pair.fds[self._hosts[member.rank]], member)

    def open(self, fd: int, member: Member) -> Exchange:
        return ShmExchange(fd, self._shape, member)

    def close(self) -> None:
        self.pair.close()


class FusedTwoHosts(TwoHosts):
    def open(self, fd: int, member: Member) -> Exchange:
        return FusedExchange(fd, self._shape, member, load(best_build()))


class Processes:
    """An end for each process of `pool`, all over what lies at `place`."""

    remote = RemoteExchange

    def __init__(self, pool: Pool, shape: ExchangeShape, place: str) -> None:
        self._pool = pool
        self._shape = shape
        self._place = place
        self._ends: dict[Member, RemoteExchange] = {}

    def end(self, member: Member) -> RemoteExchange:
        return self.remote(self._pool, self._shape, member, self._place, self._ends)

    def close(self) -> None:
        for end in self._ends.values():
            end.abandon()


def open_shm(shape: ExchangeShape, member: Member, place: str) -> Exchange:
    fd = os.open(place, os.O_RDWR)
    try:
        return ShmExchange(fd, shape, member)
    finally:
        os.close(fd)


class ShmProcesses(Processes):
    """Needs no GPU: it shows that ends in other processes are as good as ends in this one."""

    pool = Pool(open_shm)

    def __init__(self, shape: ExchangeShape) -> None:
        self._fd = Windows.create(shape)
        super().__init__(self.pool, shape, f"/proc/{os.getpid()}/fd/{self._fd}")

    def close(self) -> None:
        super().close()
        os.close(self._fd)


@contextmanager
def mps_if_installed() -> Iterator[Mapping[str, str]]:
    """Without it ranks on one GPU take turns, and every operation costs time slices."""
    if shutil.which(PROGRAM) is None:
        yield {}
        return
    with mps_daemon() as environment:
        yield environment


class OnDevice(Processes):
    """In processes of their own, as CUDA shares memory between processes alone."""

    pool: Pool
    remote = RemoteDeviceExchange

    def __init__(self, shape: ExchangeShape) -> None:
        self._directory = tempfile.mkdtemp(prefix="elastic_ep-contract-")
        super().__init__(self.pool, shape, self._directory)

    def close(self) -> None:
        super().close()
        shutil.rmtree(self._directory)


class Mooncake(OnDevice):
    pool = Pool(open_mooncake, warm_up_mooncake, mps_if_installed)


class PeerMemory(OnDevice):
    pool = Pool(open_peer_memory, warm_up_peer_memory, mps_if_installed)


def end_processes() -> None:
    for hub in (ShmProcesses, Mooncake, PeerMemory):
        hub.pool.close()


@dataclass(frozen=True)
class Kind:
    """A hub, and what may be expected of its exchange beyond the contract, or not."""

    hub: Callable[[ExchangeShape], Hub]
    on_device: bool = False
    """Inputs are not checked, and nobody knows what an operation in progress waits for."""
    experts_multiple: int = 1
    """Of physical experts of a group."""
    hidden_multiple: int = 1
    """Of a row's elements."""
    most_examples: int = 1000
    """Of hypothesis, for each property."""
    phases: Collection[Phase] = tuple(Phase)
    steps: int = 300
    """Of a long run."""

    def fit(self, shape: ExchangeShape) -> ExchangeShape:
        """`shape` with as many more elements a row as it takes."""
        return replace(shape, hidden=-(-shape.hidden // self.hidden_multiple) * self.hidden_multiple)


LOOPBACK = Kind(Loopback)
SHM = Kind(Shm)
FUSED = Kind(FusedShm)
TWO_HOSTS = Kind(TwoHosts, most_examples=6, steps=60)
FUSED_TWO_HOSTS = Kind(FusedTwoHosts, most_examples=6, steps=60)
SHM_PROCESSES = Kind(ShmProcesses)
MOONCAKE = Kind(
    Mooncake,
    on_device=True,
    experts_multiple=EXPERTS_MULTIPLE,
    hidden_multiple=HIDDEN_MULTIPLE,
    most_examples=8,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),  # to shrink takes hundreds of examples
)
PEER_MEMORY = Kind(
    PeerMemory,
    on_device=True,
    most_examples=8,
    phases=(Phase.explicit, Phase.reuse, Phase.generate),
)
