"""Both ends of the connection between the run process and a host that has joined: over TCP, with the group's key.

Messages are two frames, version and body, as everywhere. A host has an identity for each of its lives (`token`).
"""

from __future__ import annotations

import socket
from collections.abc import Callable

import zmq

from elastic_ep.wire.codec import MalformedMessage, pack, unpack
from elastic_ep.wire.drain import Drain, make_socket
from elastic_ep.wire.envelope import VERSION, check_version
from elastic_ep.wire.group_key import GroupKey
from elastic_ep.wire.guard import Guard, dial, with_key
from elastic_ep.wire.host_messages import FromHost, ToHost

_RECONNECT_MS, _LONGEST_RECONNECT_MS = 20, 500


def listen(address: str, port: int) -> socket.socket:
    """Where other hosts' carriers dial; at a port of the system's choice if `port` is 0. Raises OSError."""
    return socket.create_server((address, port), family=socket.AF_INET6 if ":" in address else socket.AF_INET)


def _body(frames: list[bytes]) -> bytes:
    check_version(frames[0])
    if len(frames) != 2:
        raise MalformedMessage(f"{len(frames)} frames, not a version and a body")
    return frames[1]


class HostsWire:
    """The run process's end. `on_closed` hears the token whose connection has ended, `on_bad` one that talks nonsense."""

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        guard: Guard,
        address: str,
        port: int,
        on_message: Callable[[bytes, FromHost], None],
        on_closed: Callable[[bytes], None],
        on_bad: Callable[[bytes, str], None],
    ) -> None:
        """Raises `zmq.ZMQError`."""
        self._on_message, self._on_closed, self._on_bad = on_message, on_closed, on_bad
        self._connections: dict[int, bytes] = {}
        """Whose each descriptor is."""
        self._socket = make_socket(context, zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        self.port = guard.bind(self._socket, address, port, self._closed)
        self._drain = Drain(self._socket, self._on_frames, copy=False)
        self._drain.start()

    def send(self, token: bytes, message: ToHost) -> None:
        """One that is not there does not get it: that it is not is heard otherwise."""
        self._socket.send_multipart([token, VERSION, pack(message)], zmq.NOBLOCK)
        self._drain.after_send()

    def hear(self) -> None:
        """Take what has come by now."""
        self._drain.run()

    def close(self) -> None:
        self._drain.close()
        self._socket.close(100)

    def _on_frames(self, frames: list[zmq.Frame]) -> None:
        token = frames[0].bytes
        self._connections[frames[0].get(zmq.SRCFD)] = token
        try:
            message: FromHost = unpack(_body([frame.bytes for frame in frames[1:]]), FromHost)
        except (MalformedMessage, IndexError) as error:
            self._on_bad(token, str(error))
            return
        self._on_message(token, message)

    def _closed(self, fd: int) -> None:
        if (token := self._connections.pop(fd, None)) is not None:
            self._on_closed(token)


class HostWire:
    """A joining host's end. It dials until somebody answers, and again when the connection is lost."""

    def __init__(
        self,
        address: str,
        port: int,
        key: GroupKey,
        token: bytes,
        on_message: Callable[[ToHost], None],
        on_bad: Callable[[str], None],
    ) -> None:
        self._on_message, self._on_bad = on_message, on_bad
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket = make_socket(self._context, zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, token)
        self._socket.reconnect_ivl = _RECONNECT_MS
        self._socket.reconnect_ivl_max = _LONGEST_RECONNECT_MS
        self._socket.setsockopt(zmq.SNDHWM, 0)
        with_key(self._socket, key)
        dial(self._socket, address, port)
        self._drain = Drain(self._socket, self._on_frames)
        self._drain.start()

    def send(self, message: FromHost) -> None:
        self._socket.send_multipart([VERSION, pack(message)], zmq.NOBLOCK)
        self._drain.after_send()

    def close(self) -> None:
        self._drain.close()
        self._context.destroy(linger=200)

    def _on_frames(self, frames: list[bytes]) -> None:
        try:
            message: ToHost = unpack(_body(frames), ToHost)
        except MalformedMessage as error:
            self._on_bad(str(error))
            return
        self._on_message(message)
