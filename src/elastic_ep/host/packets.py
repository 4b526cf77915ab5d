"""A SEQPACKET socket between two processes of a host, on the event loop: messages in order, descriptors beside them."""

from __future__ import annotations

import asyncio
import os
import socket
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from elastic_ep.wire.codec import MalformedMessage, pack, unpack
from elastic_ep.wire.envelope import VERSION, check_version

PACKET_BYTES = 64 << 10
MOST_FDS = 3
_MARK = b"\0"
"""Between version and body."""


class PacketSocket:
    """One end, which owns `end`. What arrives is of the union `expected`; what is not goes to `on_refused`.

    `on_closed` is called once, when the other end is closed and all that it said was heard; a descriptor that comes with
    a message is the listener's. `send_at_once` is for any thread, all else for the event loop's.
    """

    def __init__(
        self,
        end: socket.socket,
        expected: Any,
        on_message: Callable[[Any, list[int]], None],
        on_refused: Callable[[str], None],
        on_closed: Callable[[], None],
    ) -> None:
        end.setblocking(False)
        self._end = end
        self._expected = expected
        self._on_message = on_message
        self._on_refused = on_refused
        self._on_closed = on_closed
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[tuple[bytes, list[int]]] = deque()
        """What the other end has not had room for. These descriptors are ours."""
        self.closed = False
        self._loop.add_reader(end, self.hear)

    def send(self, message: object, *fds: int) -> None:
        """In order. One that the other end is not there for is dropped. The descriptors stay the caller's."""
        packet = _sealed(message)
        if self.closed:
            return
        if not self._waiting and self._sent(packet, fds):
            return
        if not self._waiting:
            self._loop.add_writer(self._end, self._send_the_rest)
        self._waiting.append((packet, [os.dup(fd) for fd in fds]))

    def send_at_once(self, message: object) -> bool:
        """From any thread; False, and nothing is sent, if it would have to wait for its turn."""
        try:
            return not self._waiting and not self.closed and self._sent(_sealed(message), ())
        except OSError:  # closed meanwhile
            return False

    def hear(self) -> None:
        """Take what has come."""
        while not self.closed:
            try:
                packet, fds, _, _ = socket.recv_fds(
                    self._end, PACKET_BYTES, MOST_FDS, socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                return
            except ConnectionResetError:
                packet, fds = b"", []
            if not packet:
                self.close()
                self._on_closed()
                return
            self._take(packet, fds)

    def close(self) -> None:
        if self.closed:
            return
        self.closed = True
        self._loop.remove_reader(self._end)
        self._loop.remove_writer(self._end)
        for _, fds in self._waiting:
            _close(fds)
        self._waiting.clear()
        self._end.close()

    def _take(self, packet: bytes, fds: list[int]) -> None:
        version, _, body = packet.partition(_MARK)
        try:
            check_version(version)
            message = unpack(body, self._expected)
        except MalformedMessage as error:
            _close(fds)
            self._on_refused(str(error))
            return
        self._on_message(message, fds)

    def _send_the_rest(self) -> None:
        while self._waiting:
            packet, fds = self._waiting[0]
            if not self._sent(packet, fds):
                return
            self._waiting.popleft()
            _close(fds)
        self._loop.remove_writer(self._end)

    def _sent(self, packet: bytes, fds: tuple[int, ...] | list[int]) -> bool:
        """False: not yet. To an end that is gone everything is sent: `hear` is about to see that it is."""
        try:
            with suppress(BrokenPipeError, ConnectionResetError):
                socket.send_fds(self._end, [packet], fds)
        except BlockingIOError:
            return False
        return True


def _sealed(message: object) -> bytes:
    return VERSION + _MARK + pack(message)


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)
