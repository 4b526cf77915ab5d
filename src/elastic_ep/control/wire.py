"""ZeroMQ sockets as callbacks on the event loop.

The sockets are plain (not zmq.asyncio) ones, drained from `loop.add_reader` on ZeroMQ's own file descriptor:
one callback a message, no task switch. HAZARD: that descriptor is edge-triggered, and a send may swallow the edge
of an arrival, so every send on a socket that also receives is followed by a drain.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import zmq

from elastic_ep.codec import MalformedMessage, decode, encode
from elastic_ep.messages import (
    Beat,
    FromRank,
    Member,
    Numbered,
    Published,
    ToRank,
)

_QUEUE_LIMIT = 100_000
MAX_MESSAGE_BYTES = 64 << 20


def _socket(context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
    socket = context.socket(kind)
    socket.linger = 0
    socket.set_hwm(_QUEUE_LIMIT)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    return socket


class _Drain:
    """Calls `on_parts` with each multipart message that arrives on `socket`."""

    def __init__(self, socket: zmq.Socket[bytes], on_parts: Callable[[list[bytes]], None]) -> None:
        self._socket = socket
        self._on_parts = on_parts
        self._loop = asyncio.get_running_loop()
        self._fd = int(socket.getsockopt(zmq.FD))
        self._loop.add_reader(self._fd, self.run)
        self._loop.call_soon(self.run)

    def run(self) -> None:
        while not self._socket.closed:
            try:
                parts = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            self._on_parts(parts)

    def after_send(self) -> None:
        self._loop.call_soon(self.run)

    def close(self) -> None:
        self._loop.remove_reader(self._fd)


class ControllerWire:
    """The controller's end. `on_message` gets each valid message; all others are counted in `dropped`."""

    def __init__(self, directory: Path, on_message: Callable[[FromRank], None]) -> None:
        self.number = 0
        self.dropped = 0
        self._on_message = on_message
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._pub = _socket(self._context, zmq.PUB)
        self._router = _socket(self._context, zmq.ROUTER)
        # A relaunched rank has a new identity; taking over an identity is for a reconnect of the same process.
        self._router.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self._pub.bind(f"ipc://{directory}/pub")
        self._router.bind(f"ipc://{directory}/rank")
        self._drain = _Drain(self._router, self._on_parts)

    def publish(self, body: Published) -> None:
        if not isinstance(body, Beat):
            self.number += 1
        self._pub.send(encode(Numbered(self.number, body)), zmq.NOBLOCK)

    def send(self, member: Member, message: ToRank) -> None:
        """To one rank. A rank that is gone is no error: the message is dropped."""
        try:
            self._router.send_multipart([_identity(member), encode(message)], zmq.NOBLOCK)
        except zmq.Again:
            self.dropped += 1
        self._drain.after_send()

    def close(self) -> None:
        self._drain.close()
        self._context.destroy(linger=100)

    def _on_parts(self, parts: list[bytes]) -> None:
        try:
            if len(parts) != 2:
                raise MalformedMessage(f"{len(parts)} parts")
            message: FromRank = decode(parts[1], FromRank)
            if _identity(Member(message.rank, message.incarnation)) != parts[0]:
                raise MalformedMessage("identity does not match")
        except MalformedMessage:
            self.dropped += 1
            return
        self._on_message(message)


class RankWire:
    """A rank's end."""

    def __init__(
        self,
        directory: Path,
        member: Member,
        on_published: Callable[[Numbered], None],
        on_direct: Callable[[ToRank], None],
    ) -> None:
        self.dropped = 0
        self._on_published = on_published
        self._on_direct = on_direct
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._sub = _socket(self._context, zmq.SUB)
        self._sub.subscribe(b"")
        self._dealer = _socket(self._context, zmq.DEALER)
        self._dealer.setsockopt(zmq.IDENTITY, _identity(member))
        self._sub.connect(f"ipc://{directory}/pub")
        self._dealer.connect(f"ipc://{directory}/rank")
        self._drains = [_Drain(self._sub, self._on_pub_parts), _Drain(self._dealer, self._on_direct_parts)]

    def send(self, message: FromRank) -> None:
        try:
            self._dealer.send(encode(message), zmq.NOBLOCK)
        except zmq.Again:
            self.dropped += 1
        self._drains[1].after_send()

    def close(self) -> None:
        for drain in self._drains:
            drain.close()
        self._context.destroy(linger=200)

    def _on_pub_parts(self, parts: list[bytes]) -> None:
        try:
            message: Numbered = decode(parts[0], Numbered)
        except MalformedMessage:
            self.dropped += 1
            return
        self._on_published(message)

    def _on_direct_parts(self, parts: list[bytes]) -> None:
        try:
            message: ToRank = decode(parts[-1], ToRank)
        except MalformedMessage:
            self.dropped += 1
            return
        self._on_direct(message)


def _identity(member: Member) -> bytes:
    return b"%d.%d" % member
