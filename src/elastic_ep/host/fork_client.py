"""The launcher's end of one fork server process. Who has begun it says when it has exited."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import Callable
from contextlib import suppress

from elastic_ep.host.fork_messages import (
    PACKET_BYTES,
    Exited,
    Fork,
    FromServer,
    Imported,
    LaunchOptions,
    Resync,
    ToServer,
)
from elastic_ep.wire.codec import decode, encode


class ForkClient:
    """One running fork server, which is killed if it is not ready or does not answer in time.

    Callbacks come from the event loop; there are none after `exited`. `files` are the mutexes' and the `SharedFiles`.
    `control` and `pidfd` are this object's. `ready`: another agent has had it before, and it forks already.
    """

    def __init__(
        self,
        options: LaunchOptions,
        files: tuple[int, ...],
        pid: int,
        control: socket.socket,
        pidfd: int,
        ready: bool,
        on_message: Callable[[FromServer, list[int]], None],
    ) -> None:
        self._options = options
        self._files = files
        self._timing = options.timing
        self._on_message = on_message
        self._loop = asyncio.get_running_loop()
        self._control, self._pidfd = control, pidfd
        self._control.setblocking(False)
        self.pid = pid
        self.ready = ready
        self._timer = self._loop.call_later(self._timing.server_ready_ms / 1000, self.kill)
        self._loop.add_reader(self._control, self._receive)
        if ready:
            self._timer.cancel()

    def resync(self) -> None:
        """Have it say what it may have said to an agent that is dead: `Resynced` comes last."""
        self._send(Resync())

    def fork(self, message: Fork, life_fd: int, config_fd: int) -> bool:
        """Ask for a rank; False when the server does not listen any more (it is dead or about to be)."""
        return self._send(message, life_fd, config_fd)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def hang_up(self) -> None:
        """Tell it to clean up and go, as far as this end is concerned: it kills the ranks it still has."""
        if self._control.fileno() >= 0:
            self._loop.remove_reader(self._control)
            self._control.close()

    def exited(self) -> None:
        """It is gone; what it said before is heard now."""
        if self._control.fileno() >= 0:
            self._receive()
        self._timer.cancel()
        os.close(self._pidfd)
        self.hang_up()

    def _receive(self) -> None:
        while self._control.fileno() >= 0:
            try:
                data, fds, _, _ = socket.recv_fds(self._control, PACKET_BYTES, 1, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                return
            except ConnectionResetError:
                data, fds = b"", []
            if not data:
                self._loop.remove_reader(self._control)
                return
            message: FromServer = decode(data, FromServer)
            if isinstance(message, Imported):
                self._tell_options()
                continue
            if not isinstance(message, Exited):
                self._timer.cancel()
                self.ready = True
            self._on_message(message, fds)

    def _tell_options(self) -> None:
        with suppress(BrokenPipeError):  # it has died already: `on_exit` says so
            socket.send_fds(self._control, [encode(self._options)], self._files)

    def _send(self, message: ToServer, *fds: int) -> bool:
        """False: it does not listen any more."""
        try:
            socket.send_fds(self._control, [encode(message)], fds)
        except OSError:
            return False
        self._timer = self._loop.call_later(self._timing.server_reply_ms / 1000, self.kill)
        return True
