"""The sockets: what has arrived is heard without anything else happening, and each rank speaks for itself alone."""

from __future__ import annotations

import asyncio
import os
import select
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
import zmq

from elastic_ep.wire.codec import pack
from elastic_ep.wire.drain import Drain
from elastic_ep.wire.envelope import VERSION
from elastic_ep.wire.messages import Beat, Cancel, Hello, Member, Numbered, SnapshotRequest, View
from elastic_ep.wire.sockets import ControllerWire, RankWire

pytestmark = pytest.mark.anyio

A, B = Member(0, 1), Member(1, 3)
DEADLINE_S = 10.0
ROUNDS = 20


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@dataclass
class End:
    """What one end has heard, and what it is waited for."""

    heard: list[Any] = field(default_factory=list)
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def hear(self, *said: Any) -> None:
        self.heard.append(said if len(said) > 1 else said[0])
        self.changed.set()

    async def until(self, count: int) -> None:
        async with asyncio.timeout(DEADLINE_S):
            while len(self.heard) < count:
                self.changed.clear()
                await self.changed.wait()


class Ends:
    """A controller and two ranks. A blocking `arrived` keeps the event loop out while a message comes in."""

    def __init__(self, directory: Path) -> None:
        self.controller = End()
        self.ranks = {A: End(), B: End()}
        self.errors = End()
        self.wire = ControllerWire(directory)
        self.wire.receive(self.controller.hear, self.errors.hear)
        self.wires = {
            member: RankWire(directory, member, end.hear, end.hear, lambda _id, _why: None)
            for member, end in self.ranks.items()
        }

    @property
    def blamed(self) -> list[Member | None]:
        return [member for member, _why in self.errors.heard]

    async def settle(self) -> None:
        """All sockets are connected, and everything that was sent is heard."""
        for wire in self.wires.values():
            wire.send(Hello(1))
        await self.controller.until(2)
        for member, end in self.ranks.items():
            while not end.heard:
                self.wire.publish(Beat())
                await asyncio.sleep(0)
            self.wire.send(member, Cancel(0))
            async with asyncio.timeout(DEADLINE_S):
                while Cancel(0) not in end.heard:
                    end.changed.clear()
                    await end.changed.wait()

    def close(self) -> None:
        for wire in self.wires.values():
            wire.close()
        self.wire.close()


@asynccontextmanager
async def connected(directory: Path) -> AsyncIterator[Ends]:
    ends = Ends(directory)
    try:
        await ends.settle()
        yield ends
    finally:
        ends.close()


def arrived(socket: zmq.Socket[bytes]) -> None:
    """Block until something has come in that the event loop has not been told of."""
    ready, _, _ = select.select([int(socket.getsockopt(zmq.FD))], [], [], DEADLINE_S)
    assert ready, "it does not come"


async def test_a_controller_that_sends_hears_what_came_in_meanwhile(directory: Path) -> None:
    """The send takes the news of the arrival off the socket; nothing else will ever tell of it."""
    async with connected(directory) as ends:
        for number in range(ROUNDS):
            before = len(ends.controller.heard)
            ends.wires[A].send(SnapshotRequest())
            arrived(ends.wire._router)
            ends.wire.send(B, Cancel(number))
            await ends.controller.until(before + 1)
            assert ends.controller.heard[-1] == (A, SnapshotRequest())


async def test_a_rank_that_sends_hears_what_came_in_meanwhile(directory: Path) -> None:
    async with connected(directory) as ends:
        for number in range(1, ROUNDS):
            end = ends.ranks[A]
            before = len(end.heard)
            ends.wire.send(A, Cancel(number))
            arrived(ends.wires[A]._dealer)
            ends.wires[A].send(SnapshotRequest())
            await end.until(before + 1)
            assert end.heard[-1] == Cancel(number)


async def test_many_messages_at_once_are_all_heard_in_order(directory: Path) -> None:
    """One edge tells of all of them."""
    async with connected(directory) as ends:
        before = len(ends.ranks[B].heard)
        for number in range(500):
            ends.wire.send(B, Cancel(number))
        await ends.ranks[B].until(before + 500)
        assert ends.ranks[B].heard[before:] == [Cancel(number) for number in range(500)]


class Full:
    """A socket in which everything is before anybody looks, so that its descriptor tells of nothing any more."""

    closed = False

    def __init__(self, fd: int, count: int) -> None:
        self._fd = fd
        self._left = [[b"%d" % number] for number in reversed(range(count))]

    def getsockopt(self, _option: int) -> int:
        return self._fd

    def recv_multipart(self, _flags: int) -> list[bytes]:
        if not self._left:
            raise zmq.Again
        return self._left.pop()


async def test_a_message_that_nobody_can_take_does_not_keep_back_those_behind_it() -> None:
    end, faults = End(), []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _loop, facts: faults.append(str(facts["exception"])))

    def fails(parts: list[bytes]) -> None:
        end.hear(parts)
        if parts in ([b"0"], [b"3"]):
            raise RuntimeError("a fault of this program")

    reader, writer = os.pipe()
    drain = Drain(cast(Any, Full(reader, 9)), fails)
    drain.start()
    await end.until(9)
    drain.close()
    os.close(reader)
    os.close(writer)
    assert end.heard == [[b"%d" % number] for number in range(9)]
    assert faults == 2 * ["a fault of this program"]


async def test_what_is_published_is_numbered_and_beats_repeat_the_number(directory: Path) -> None:
    async with connected(directory) as ends:
        start = {member: len(end.heard) for member, end in ends.ranks.items()}
        views = [View(epoch, ()) for epoch in (1, 2)]
        for body in (views[0], Beat(), views[1], Beat()):
            ends.wire.publish(body)
        assert ends.wire.number == 2
        for member, end in ends.ranks.items():
            await end.until(start[member] + 4)
            assert end.heard[start[member] :] == [
                Numbered(1, views[0]), Numbered(1, Beat()), Numbered(2, views[1]), Numbered(2, Beat()),
            ]  # fmt: skip


async def test_the_sender_is_whose_socket_it_is(directory: Path) -> None:
    async with connected(directory) as ends:
        before = len(ends.controller.heard)
        for count, member in enumerate([A, B, B, A], before + 1):
            ends.wires[member].send(SnapshotRequest())
            await ends.controller.until(count)
        assert ends.controller.heard[before:] == [(member, SnapshotRequest()) for member in (A, B, B, A)]


@pytest.mark.parametrize(
    "identity", [b"rank", b"0", b"0.", b"00.1", b"0.1.1", b"-1.1", "\u0663.1".encode(), b"9" * 255]
)
async def test_what_comes_from_no_rank_is_refused_and_nobody_is_blamed(
    directory: Path, identity: bytes
) -> None:
    async with connected(directory) as ends:
        before = len(ends.controller.heard)
        with stranger(directory, identity) as socket:
            socket.send_multipart([VERSION, pack(SnapshotRequest())])
            await ends.errors.until(1)
        ends.wires[A].send(SnapshotRequest())
        await ends.controller.until(before + 1)
        assert ends.controller.heard[before:] == [(A, SnapshotRequest())]
        assert ends.blamed == [None]
        assert "from no rank" in ends.errors.heard[0][1]


@contextmanager
def stranger(directory: Path, identity: bytes) -> Iterator[zmq.Socket[bytes]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.IDENTITY, identity)
    socket.connect(f"ipc://{directory}/rank")
    try:
        yield socket
    finally:
        context.destroy(linger=0)


@pytest.mark.parametrize("version", [b"", b"0", b"2", b"11", b"\xff" * 1000, pack(SnapshotRequest())])
@pytest.mark.parametrize("body", [pack(SnapshotRequest()), b"of another form", None])
async def test_an_unknown_version_is_refused_whatever_follows(
    directory: Path, version: bytes, body: bytes | None
) -> None:
    frames = [version] if body is None else [version, body]
    async with connected(directory) as ends:
        before = {member: len(end.heard) for member, end in ends.ranks.items()}
        heard = len(ends.controller.heard)
        ends.wires[A]._dealer.send_multipart(frames)
        ends.wires[A].send(SnapshotRequest())
        await ends.controller.until(heard + 1)
        assert ends.controller.heard[heard:] == [(A, SnapshotRequest())]
        assert ends.blamed == [A]
        assert "version" in ends.errors.heard[0][1]
        assert "speaks 1" in ends.errors.heard[0][1]
        ends.wire._router.send_multipart([b"0.1", *frames])
        ends.wire._pub.send_multipart(frames)
        ends.wire.send(A, Cancel(2))
        ends.wire.publish(Beat())
        await ends.ranks[A].until(before[A] + 2)
        await ends.ranks[B].until(before[B] + 1)
        assert ends.ranks[B].heard[before[B] :] == [Numbered(0, Beat())]
        assert [ends.wires[member].dropped for member in (A, B)] == [2, 1]


async def test_what_cannot_be_read_is_counted_and_costs_nothing_else(directory: Path) -> None:
    async with connected(directory) as ends:
        before = len(ends.controller.heard)
        raw = ends.wires[A]._dealer
        raw.send_multipart([VERSION, b"not a message"])
        raw.send_multipart([VERSION, b"two", b"bodies"])
        ends.wires[A].send(SnapshotRequest())
        await ends.controller.until(before + 1)
        assert ends.controller.heard[before:] == [(A, SnapshotRequest())]
        assert ends.wire.dropped == 2
        assert ends.blamed == [A, A]
        before = len(ends.ranks[A].heard)
        ends.wire._router.send_multipart([b"0.1", VERSION, b"not a message"])
        ends.wire._pub.send_multipart([VERSION, pack(Cancel(1))])
        ends.wire.send(A, Cancel(2))
        ends.wire.publish(Beat())
        await ends.ranks[A].until(before + 2)
        assert sorted(map(repr, ends.ranks[A].heard[before:])) == sorted(
            map(repr, [Cancel(2), Numbered(0, Beat())])
        )
        assert ends.wires[A].dropped == 2


async def test_to_a_rank_that_is_gone_nothing_is_kept_and_nothing_raises(directory: Path) -> None:
    async with connected(directory) as ends:
        ends.wire.send(Member(5, 1), Cancel(1))
        before = len(ends.ranks[A].heard)
        ends.wire.send(A, Cancel(2))
        await ends.ranks[A].until(before + 1)
