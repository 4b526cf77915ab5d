"""Plain ZeroMQ sockets as callbacks on the event loop.

They are drained from `loop.add_reader` on ZeroMQ's own file descriptor: one callback a message, no task switch.
HAZARD: that descriptor is edge-triggered, and a send may swallow the edge of an arrival, so every send on a socket
that also receives is followed by a drain.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import zmq

QUEUE_LIMIT = 100_000
"""Messages to a rank that it has not read: far more than one that reads at all ever leaves."""
MAX_MESSAGE_BYTES = 64 << 20
_TURN_S = 0.01


def make_socket(context: zmq.Context[zmq.Socket[bytes]], kind: int) -> zmq.Socket[bytes]:
    socket = context.socket(kind)
    socket.linger = 0
    socket.set_hwm(QUEUE_LIMIT)
    socket.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE_BYTES)
    return socket


class Drain:
    """Calls `on_parts` with each multipart message that arrives on `socket`, in a turn of the loop for `_TURN_S`.

    Its parts are bytes, or with `copy=False` ZeroMQ's frames, which know where they came from.
    """

    def __init__(
        self, socket: zmq.Socket[bytes], on_parts: Callable[[list[Any]], None], copy: bool = True
    ) -> None:
        self._socket = socket
        self._receive = socket.recv_multipart if copy else partial(socket.recv_multipart, copy=False)
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
                parts = self._receive(zmq.NOBLOCK)
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
