"""ZeroMQ sockets as callbacks on the event loop.

The sockets are plain (not zmq.asyncio) ones, drained from `loop.add_reader` on ZeroMQ's own file descriptor:
one callback a message, no task switch.
HAZARD: that descriptor is edge-triggered, and a send may swallow the edge of an arrival, so every send on a socket
that also receives is followed by a drain.

Every message is two frames, the version of the protocol and the body. A rank's socket has its member as its identity,
which ZeroMQ puts before what comes from it: that is the sender, and no message says it again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import structlog
import zmq

from elastic_ep.wire.codec import MalformedMessage, pack, unpack
from elastic_ep.wire.envelope import VERSION, check_version
from elastic_ep.wire.messages import (
    Beat,
    FromRank,
    Member,
    Numbered,
    Published,
    ToRank,
)
from elastic_ep.wire.outbox import Outbox

log = structlog.get_logger()
_QUEUE_LIMIT = 100_000
"""Messages to a rank that it has not read: far more than one that reads at all ever leaves."""
_TURN_S = 0.01
MAX_MESSAGE_BYTES = 64 << 20


def _socket(context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
    socket = context.socket(kind)
    socket.linger = 0
    socket.set_hwm(_QUEUE_LIMIT)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    return socket


class _Drain:
    """Calls `on_parts` with each multipart message that arrives on `socket`, in a turn of the loop for `_TURN_S`."""

    def __init__(self, socket: zmq.Socket[bytes], on_parts: Callable[[list[bytes]], None]) -> None:
        self._socket = socket
        self._on_parts = on_parts
        self._loop = asyncio.get_running_loop()
        self._paused = False
        """What has come besides is taken in the next turn."""
        self._sent = False
        """What has come will be taken, after the sends of this turn."""
        self._fd = int(socket.getsockopt(zmq.FD))

    def start(self) -> None:
        self._loop.add_reader(self._fd, self.run)
        self._loop.call_soon(self.run)

    def run(self) -> None:
        self._sent = False
        if not self._paused:
            self._take()

    def _take(self) -> None:
        self._paused = False
        until = time.monotonic() + _TURN_S
        while not self._socket.closed:
            try:
                parts = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            try:
                self._on_parts(parts)
            except Exception:
                # HAZARD: the descriptor tells of what comes, not of what is left.
                self._loop.call_soon(self.run)
                raise
            if time.monotonic() >= until:
                self._paused = True
                self._loop.call_soon(self._take)
                return

    def later(self, call: Callable[..., None], *arguments: object) -> None:
        self._loop.call_soon(call, *arguments)

    def after_send(self) -> None:
        if not self._sent:
            self._sent = True
            self._loop.call_soon(self.run)

    def close(self) -> None:
        self._loop.remove_reader(self._fd)


class ControllerWire:
    """The controller's end. What comes in waits until `receive`."""

    def __init__(self, directory: Path) -> None:
        self.number = 0
        self.dropped = 0
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._pub = _socket(self._context, zmq.PUB)
        self._router = _socket(self._context, zmq.ROUTER)
        # A relaunched rank has a new identity; taking over an identity is for a reconnect of the same process.
        self._router.setsockopt(zmq.ROUTER_HANDOVER, 1)
        # HAZARD: else a message for which there is no room in a rank's queue is dropped, and nobody is told.
        self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._pub.bind(f"ipc://{directory}/pub")
        self._router.bind(f"ipc://{directory}/rank")
        self._drain = _Drain(self._router, self._on_parts)
        self._outbox = Outbox(self._send, self._drain.later)

    def receive(
        self, on_message: Callable[[Member, FromRank], None], on_error: Callable[[Member | None, str], None]
    ) -> None:
        """From now on `on_message` gets each valid message and who sent it.

        `on_error` hears of everything else, counted in `dropped`: what is no message, and of a rank that does not read
        its own. It gets the rank to blame, if that is known.
        """
        self._on_message, self._on_error = on_message, on_error
        self._drain.start()

    def publish(self, body: Published) -> None:
        if not isinstance(body, Beat):
            self.number += 1
        self._pub.send_multipart([VERSION, pack(Numbered(self.number, body))], zmq.NOBLOCK)

    def send(self, member: Member, message: ToRank) -> None:
        """To one rank, in order (see `Outbox`). One that is gone is no error: the message is dropped: its death says all.

        One that does not read is one: `on_error` hears of it soon, but not before this returns.
        """
        self._outbox.put(member, message)

    def _send(self, member: Member, message: ToRank) -> None:
        try:
            self._router.send_multipart([_identity(member), VERSION, pack(message)], zmq.NOBLOCK)
        except zmq.Again:
            self._drain.later(self._refuse, member, f"{_QUEUE_LIMIT} messages to it are not read")
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
        self._drain.after_send()

    def close(self) -> None:
        self._drain.close()
        self._context.destroy(linger=100)

    def _on_parts(self, parts: list[bytes]) -> None:
        member = _member(parts[0])
        try:
            if member is None:
                raise MalformedMessage(f"from no rank: {parts[0]!r}")
            message: FromRank = unpack(_body(parts[1:]), FromRank)
        except MalformedMessage as error:
            self._refuse(member, str(error))
            return
        self._on_message(member, message)

    def _refuse(self, member: Member | None, why: str) -> None:
        self.dropped += 1
        self._on_error(member, why)


class RankWire:
    """A rank's end. `on_refused` hears of requests that came in a message which is none: number and reason.

    Other messages that are none are only counted in `dropped`: whatever they ask for is asked for again.
    """

    def __init__(
        self,
        directory: Path,
        member: Member,
        on_published: Callable[[Numbered], None],
        on_direct: Callable[[ToRank], None],
        on_refused: Callable[[int, str], None],
    ) -> None:
        self.dropped = 0
        self._on_published = on_published
        self._on_direct = on_direct
        self._on_refused = on_refused
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._sub = _socket(self._context, zmq.SUB)
        self._sub.subscribe(b"")
        self._dealer = _socket(self._context, zmq.DEALER)
        # Without a limit: what a rank reports is never dropped, however late the controller reads it.
        self._dealer.setsockopt(zmq.SNDHWM, 0)
        self._dealer.setsockopt(zmq.IDENTITY, _identity(member))
        self._sub.connect(f"ipc://{directory}/pub")
        self._dealer.connect(f"ipc://{directory}/rank")
        self._drains = [_Drain(self._sub, self._on_pub_parts), _Drain(self._dealer, self._on_direct_parts)]
        for drain in self._drains:
            drain.start()

    def send(self, message: FromRank) -> None:
        self._dealer.send_multipart([VERSION, pack(message)], zmq.NOBLOCK)
        self._drains[1].after_send()

    def close(self) -> None:
        for drain in self._drains:
            drain.close()
        self._context.destroy(linger=200)

    def _on_pub_parts(self, parts: list[bytes]) -> None:
        try:
            message: Numbered = unpack(_body(parts), Numbered)
        except MalformedMessage:
            self.dropped += 1
            return
        self._on_published(message)

    def _on_direct_parts(self, parts: list[bytes]) -> None:
        try:
            message: ToRank = unpack(_body(parts), ToRank)
        except MalformedMessage as error:
            self.dropped += 1
            request_id = _assigned(parts[-1])
            log.error("not a message", request=request_id, why=str(error))
            if request_id is not None:
                self._on_refused(request_id, str(error))
            return
        self._on_direct(message)


def _identity(member: Member) -> bytes:
    return b"%d.%d" % member


def _member(identity: bytes) -> Member | None:
    """The inverse of `_identity`."""
    rank, _, incarnation = identity.partition(b".")
    if not (rank.isdigit() and incarnation.isdigit()):
        return None
    member = Member(int(rank), int(incarnation))
    return member if _identity(member) == identity else None


def _body(frames: list[bytes]) -> bytes:
    """Raises `MalformedMessage` for another version than this one, whatever follows it."""
    check_version(frames[0])
    if len(frames) != 2:
        raise MalformedMessage(f"{len(frames)} frames, not a version and a body")
    return frames[1]


def _assigned(data: bytes) -> int | None:
    """The request that a malformed message assigns, if that much can be read."""
    try:
        plain: list[object] = unpack(data, list)
    except MalformedMessage:
        return None
    if plain[:1] == ["Assign"] and len(plain) > 1 and type(plain[1]) is int:
        return plain[1]
    return None
