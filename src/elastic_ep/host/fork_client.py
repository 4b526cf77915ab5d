"""The launcher's end of one fork server process: start it, talk to it, notice its exit."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from elastic_ep.config import LogConfig
from elastic_ep.host.fork_messages import PACKET_BYTES, Fork, ForkMessage, pack, status_text, unpack

# A library that starts threads at import would make the fork server unfit to fork, and each rank computes with
# one thread anyway.
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


@dataclass(frozen=True, slots=True)
class ServerSetup:
    """How to start fork servers; all of one run are alike."""

    entry: str
    preload: tuple[str, ...]
    directory: Path
    mutex_fd: int
    mutex_slots: int
    windows_fd: int
    nice: int
    output_fd: int | None
    """Where the fork server and the ranks write stdout and stderr; None: where this process does."""
    environment: Mapping[str, str] = field(default_factory=dict)
    log: LogConfig = field(default_factory=LogConfig)


class ForkClient:
    """One running fork server. Callbacks come from the event loop; after `on_exit` there are none.

    Raises OSError when it cannot be started.
    """

    def __init__(
        self,
        setup: ServerSetup,
        on_message: Callable[[ForkMessage, list[int]], None],
        on_exit: Callable[[str], None],
    ) -> None:
        self._on_message = on_message
        self._on_exit = on_exit
        self._loop = asyncio.get_running_loop()
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            self._process = _start(setup, theirs.fileno())
        except OSError:
            self._control.close()
            raise
        finally:
            theirs.close()
        self._control.setblocking(False)
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
            socket.send_fds(self._control, [pack(message)], [life_fd, config_fd])
        except OSError:
            return False
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
            self._on_message(unpack(data), fds)

    def _exited(self) -> None:
        self._receive()  # what it said before it died
        self._closed = True
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        if self._control.fileno() >= 0:
            self._loop.remove_reader(self._control)
            self._control.close()
        self._on_exit(status_text(self._process.wait()))


def _start(setup: ServerSetup, control_fd: int) -> subprocess.Popen[bytes]:
    command = [
        sys.executable, "-m", "elastic_ep.host.fork_server",
        "--control-fd", str(control_fd),
        "--mutex-fd", str(setup.mutex_fd),
        "--mutex-slots", str(setup.mutex_slots),
        "--windows-fd", str(setup.windows_fd),
        "--nice", str(setup.nice),
        "--entry", setup.entry,
        "--preload", ",".join(setup.preload),
        "--directory", str(setup.directory),
        "--log-level", setup.log.level,
        "--log-format", setup.log.format,
    ]  # fmt: skip
    return subprocess.Popen(
        command,
        pass_fds=(control_fd, setup.mutex_fd, setup.windows_fd),
        stdin=subprocess.DEVNULL,
        stdout=setup.output_fd,
        stderr=setup.output_fd,
        process_group=0,  # not a session: see the fork server
        env={**os.environ, **_ONE_THREAD, **setup.environment},
    )
