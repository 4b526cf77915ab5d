"""The launcher's end of one fork server process: start it, talk to it, notice its exit."""

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
    status_text,
)
from elastic_ep.host.server_process import ServerProcess
from elastic_ep.wire.codec import decode, encode


class ForkClient:
    """One running fork server, which is killed if it is not ready or does not answer in time.

    Callbacks come from the event loop; after `on_exit` there are none. `files` are the mutexes' and the `SharedFiles`.
    """

    def __init__(
        self,
        options: LaunchOptions,
        files: tuple[int, ...],
        process: ServerProcess,
        on_message: Callable[[FromServer, list[int]], None],
        on_exit: Callable[[str], None],
    ) -> None:
        self._options = options
        self._files = files
        self._timing = options.timing
        self._on_message = on_message
        self._on_exit = on_exit
        self._loop = asyncio.get_running_loop()
        process.taken = True
        self._control, self._process = process.control, process.popen
        self._control.setblocking(False)
        self.ready = False
        self._timer = self._loop.call_later(self._timing.server_ready_ms / 1000, self.kill)
        self._pidfd = os.pidfd_open(self._process.pid)
        self._closed = False
        self._loop.add_reader(self._control, self._receive)
        self._loop.add_reader(self._pidfd, self._exited)

    @property
    def pid(self) -> int:
        return self._process.pid

    def fork(self, message: Fork, life_fd: int, config_fd: int) -> bool:
        """Ask for a rank; False when the server does not listen any more (it is dead or about to be)."""
        try:
            socket.send_fds(self._control, [encode(message)], [life_fd, config_fd])
        except OSError:
            return False
        self._timer = self._loop.call_later(self._timing.server_reply_ms / 1000, self.kill)
        return True

    def kill(self) -> None:
        """`on_exit` follows."""
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def hang_up(self) -> None:
        """Tell it to clean up and go: it kills the ranks it still has. `on_exit` follows."""
        if not self._closed:
            self._loop.remove_reader(self._control)
            self._control.close()

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

    def _exited(self) -> None:
        self._receive()  # what it said before it died
        self._closed = True
        self._timer.cancel()
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        if self._control.fileno() >= 0:
            self._loop.remove_reader(self._control)
            self._control.close()
        self._on_exit(status_text(self._process.wait()))
