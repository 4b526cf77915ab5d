"""The control plane between the run process and its ranks: Unix sockets, and TCP for ranks of other hosts (`guard.py`).

Every message is two frames, the version of the protocol and the body. A rank's socket has its member as its identity,
which ZeroMQ puts before what comes from it: that is the sender, and no message says it again.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import structlog
import zmq

from elastic_ep.wire.codec import MalformedMessage, pack, unpack
from elastic_ep.wire.control_address import ControlAddress
from elastic_ep.wire.drain import QUEUE_LIMIT, Drain, make_socket
from elastic_ep.wire.envelope import VERSION, check_version
from elastic_ep.wire.group_key import GroupKey
from elastic_ep.wire.guard import Guard, dial, with_key
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
PUB_PORT, RANK_PORT, CARRIER_PORT = 1, 2, 3
"""Beyond the port at which hosts join."""


class ControllerWire:
    """The controller's end. What comes in waits until `receive`.

    With a `key` ranks of other hosts are let in, at `address` and from `port` on (`ports`): by `guard`. Raises
    `zmq.ZMQError` if nobody can listen there.
    """

    def __init__(
        self, directory: Path, key: GroupKey | None = None, address: str = "", port: int = 0
    ) -> None:
        self.number = 0
        self.dropped = 0
        self.context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self.guard = None if key is None else Guard(self.context, key)
        self.ports = (0, 0)
        """Of PUB and ROUTER."""
        self._connections: dict[int, Member] = {}
        """Whose each descriptor is."""
        self._on_ended: Callable[[Member], None] = lambda _member: None
        self._context = self.context
        self._pub = make_socket(self._context, zmq.PUB)
        self._router = make_socket(self._context, zmq.ROUTER)
        # A relaunched rank has a new identity; taking over an identity is for a reconnect of the same process.
        self._router.setsockopt(zmq.ROUTER_HANDOVER, 1)
        # HAZARD: else a message for which there is no room in a rank's queue is dropped, and nobody is told.
        self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._pub.bind(f"ipc://{directory}/pub")
        self._router.bind(f"ipc://{directory}/rank")
        if self.guard is not None:
            try:
                self.ports = (
                    self.guard.bind(self._pub, address, port and port + PUB_PORT),
                    self.guard.bind(self._router, address, port and port + RANK_PORT, self._ended),
                )
            except zmq.ZMQError:
                self.guard.close()
                self.context.destroy(linger=0)
                raise
        if self.guard is None:
            self._drain = Drain(self._router, self._on_parts)
        else:
            self._drain = Drain(self._router, self._on_frames, copy=False)
        self._outbox = Outbox(self._send, self._drain.later)

    def receive(
        self,
        on_message: Callable[[Member, FromRank], None],
        on_error: Callable[[Member | None, str], None],
        on_ended: Callable[[Member], None] = lambda _member: None,
    ) -> None:
        """From now on `on_message` gets each valid message and who sent it.

        `on_error` hears of everything else, counted in `dropped`: what is no message, and of a rank that does not read
        its own. It gets the rank to blame, if that is known. `on_ended` hears of a connection over TCP that has ended,
        also if the rank connects again: what it was sent meanwhile may be lost.
        """
        self._on_message, self._on_error, self._on_ended = on_message, on_error, on_ended
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
            self._drain.later(self._refuse, member, f"{QUEUE_LIMIT} messages to it are not read")
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
        self._drain.after_send()

    def close(self) -> None:
        self._drain.close()
        if self.guard is not None:
            self.guard.close()
        self._context.destroy(linger=100)

    def _on_frames(self, frames: list[zmq.Frame]) -> None:
        parts = [frame.bytes for frame in frames]
        if (member := _member(parts[0])) is not None:
            self._connections[frames[0].get(zmq.SRCFD)] = member
        self._on_parts(parts)

    def _ended(self, fd: int) -> None:
        if (member := self._connections.pop(fd, None)) is not None:
            self._on_ended(member)

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

    Other messages that are none are only counted in `dropped`: whatever they ask for is asked for again. `control`: where
    the run process is, if it is on another host.
    """

    def __init__(
        self,
        directory: Path,
        member: Member,
        on_published: Callable[[Numbered], None],
        on_direct: Callable[[ToRank], None],
        on_refused: Callable[[int, str], None],
        control: ControlAddress | None = None,
    ) -> None:
        self.dropped = 0
        self._on_published = on_published
        self._on_direct = on_direct
        self._on_refused = on_refused
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._sub = make_socket(self._context, zmq.SUB)
        self._sub.subscribe(b"")
        self._dealer = make_socket(self._context, zmq.DEALER)
        # Without a limit: what a rank reports is never dropped, however late the controller reads it.
        self._dealer.setsockopt(zmq.SNDHWM, 0)
        self._dealer.setsockopt(zmq.IDENTITY, _identity(member))
        if control is None:
            self._sub.connect(f"ipc://{directory}/pub")
            self._dealer.connect(f"ipc://{directory}/rank")
        else:
            for socket, port in ((self._sub, control.pub_port), (self._dealer, control.rank_port)):
                with_key(socket, GroupKey(bytes.fromhex(control.key)))
                dial(socket, control.host, port)
        self._drains = [Drain(self._sub, self._on_pub_parts), Drain(self._dealer, self._on_direct_parts)]
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
