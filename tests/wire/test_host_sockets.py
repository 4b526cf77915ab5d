"""Hosts that join over TCP: with the key they are heard, in order; all others are refused, and counted."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import anyio
import pytest
import zmq

from elastic_ep.wire.control_address import ControlAddress
from elastic_ep.wire.drain import make_socket
from elastic_ep.wire.group_key import GroupKey
from elastic_ep.wire.guard import Guard, dial, with_key
from elastic_ep.wire.host_messages import FromHost, HostAlive, Lease, ToHost
from elastic_ep.wire.host_sockets import HostsWire, HostWire
from elastic_ep.wire.messages import Hello, Member
from elastic_ep.wire.sockets import ControllerWire, RankWire

KEY, OTHER_KEY = GroupKey(bytes(32)), GroupKey(b"\1" * 32)
ME = b"a host"
DEADLINE_S = 20.0


class Heard:
    """What came, from whom; and who is to be waited for."""

    def __init__(self) -> None:
        self.messages: list[tuple[bytes, FromHost]] = []
        self.closed: list[bytes] = []
        self.bad: list[tuple[bytes, str]] = []
        self.answers: list[ToHost] = []
        self._changed = anyio.Event()

    def message(self, token: bytes, message: FromHost) -> None:
        self.messages.append((token, message))
        self.stir()

    def closed_one(self, token: bytes) -> None:
        self.closed.append(token)
        self.stir()

    def bad_one(self, token: bytes, why: str) -> None:
        self.bad.append((token, why))
        self.stir()

    def answer(self, message: ToHost) -> None:
        self.answers.append(message)
        self.stir()

    def stir(self) -> None:
        self._changed.set()
        self._changed = anyio.Event()

    async def until(self, condition: Callable[[], bool]) -> None:
        with anyio.fail_after(DEADLINE_S):
            while not condition():
                await self._changed.wait()


@asynccontextmanager
async def listening() -> AsyncIterator[tuple[HostsWire, Guard, Heard]]:
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    heard = Heard()
    guard = Guard(context, KEY, heard.stir)
    wire = HostsWire(context, guard, "127.0.0.1", 0, heard.message, heard.closed_one, heard.bad_one)
    try:
        yield wire, guard, heard
    finally:
        wire.close()
        guard.close()
        context.destroy(linger=0)


def test_both_ends_hear_each_other_in_order_and_an_end_is_told() -> None:
    async def main() -> None:
        async with listening() as (wire, guard, heard):
            host = HostWire("127.0.0.1", wire.port, KEY, ME, heard.answer, lambda _why: None)
            for number in range(20):
                host.send(HostAlive(number))
            await heard.until(lambda: len(heard.messages) == 20)
            assert heard.messages == [(ME, HostAlive(number)) for number in range(20)]
            for number in range(20):
                wire.send(ME, Lease(number))
            await heard.until(lambda: len(heard.answers) == 20)
            assert heard.answers == [Lease(number) for number in range(20)]
            wire.send(b"nobody", Lease(1))
            host.close()
            await heard.until(lambda: bool(heard.closed))
            assert heard.closed == [ME]
            assert not heard.bad
            assert guard.refused == 0

    asyncio.run(main())


def plain(_dialling: zmq.Socket[bytes]) -> None:
    pass


def with_another_group(dialling: zmq.Socket[bytes]) -> None:
    with_key(dialling, OTHER_KEY)


def knows_only_the_public_key(dialling: zmq.Socket[bytes]) -> None:
    dialling.curve_serverkey = KEY.controller.public
    dialling.curve_publickey, dialling.curve_secretkey = zmq.curve_keypair()


@pytest.mark.parametrize("arrange", [plain, with_another_group, knows_only_the_public_key])
def test_a_foreign_client_is_refused_and_counted(arrange: Callable[[zmq.Socket[bytes]], None]) -> None:
    async def main() -> None:
        async with listening() as (wire, guard, heard):
            context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
            foreign = make_socket(context, zmq.DEALER)
            arrange(foreign)
            dial(foreign, "127.0.0.1", wire.port)
            foreign.send_multipart([b"1", b"hello"])
            await heard.until(lambda: guard.refused > 0)
            context.destroy(linger=0)
            host = HostWire("127.0.0.1", wire.port, KEY, ME, lambda _message: None, lambda _why: None)
            host.send(HostAlive(1))
            await heard.until(lambda: bool(heard.messages))
            assert heard.messages == [(ME, HostAlive(1))]
            assert not heard.bad
            host.close()

    asyncio.run(main())


def test_an_end_of_a_rank_s_connection_is_told_of_that_rank(tmp_path: Path) -> None:
    async def main() -> None:
        heard: list[Member] = []
        ended: list[Member] = []
        changed = anyio.Event()

        def note(kept: list[Member], member: Member) -> None:
            kept.append(member)
            changed.set()

        wire = ControllerWire(tmp_path, KEY, "127.0.0.1")
        wire.receive(
            lambda member, _message: note(heard, member),
            lambda _member, _why: None,
            lambda member: note(ended, member),
        )
        control = ControlAddress("127.0.0.1", *wire.ports, KEY.secret.hex())
        ranks = {}
        for member in (Member(0, 1), Member(1, 2)):
            ranks[member] = RankWire(tmp_path, member, _nothing, _nothing, lambda _id, _why: None, control)
            ranks[member].send(Hello(1))
        with anyio.fail_after(DEADLINE_S):
            while len(heard) < 2:
                await changed.wait()
                changed = anyio.Event()
            ranks[Member(1, 2)].close()
            while not ended:
                await changed.wait()
                changed = anyio.Event()
        assert ended == [Member(1, 2)]
        ranks[Member(0, 1)].close()
        wire.close()

    asyncio.run(main())


def _nothing(_message: object) -> None:
    pass


def test_bytes_that_are_not_of_this_protocol_at_all_do_no_harm() -> None:
    async def main() -> None:
        async with listening() as (wire, _guard, heard):
            with socket.create_connection(("127.0.0.1", wire.port)) as stream:
                stream.sendall(b"GET / HTTP/1.1\r\n\r\n" * 100)
                host = HostWire("127.0.0.1", wire.port, KEY, ME, lambda _message: None, lambda _why: None)
                host.send(HostAlive(1))
                await heard.until(lambda: bool(heard.messages))
                host.close()
            assert not heard.bad

    asyncio.run(main())


@pytest.mark.parametrize("frames", [[b"2", b"x"], [b"1"], [b"1", b"\xc1"], [b"1", b"x", b"y"], []])
def test_who_has_the_key_and_talks_nonsense_is_told_of(frames: list[bytes]) -> None:
    async def main() -> None:
        async with listening() as (wire, _guard, heard):
            context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
            host = make_socket(context, zmq.DEALER)
            host.setsockopt(zmq.IDENTITY, ME)
            with_key(host, KEY)
            dial(host, "127.0.0.1", wire.port)
            host.send_multipart(frames or [b""])
            await heard.until(lambda: bool(heard.bad))
            assert [token for token, _ in heard.bad] == [ME]
            context.destroy(linger=0)

    asyncio.run(main())
