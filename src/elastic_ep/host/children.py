"""The processes that a keeper has started, while they run: an agent, and the fork server."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress

from elastic_ep.host import life_line
from elastic_ep.host.fork_messages import status_text
from elastic_ep.host.server_process import ServerProcess


class Spawned:
    """The process of an agent. Raises OSError when it cannot be started."""

    def __init__(self, module: str) -> None:
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        life, self.life_fd = life_line.create()
        try:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", module, str(theirs.fileno()), str(life)],
                pass_fds=(theirs.fileno(), life),
                stdin=subprocess.DEVNULL,
                process_group=0,
            )
        except OSError:
            self.control.close()
            os.close(self.life_fd)
            raise
        finally:
            theirs.close()
            os.close(life)


class AgentProcess:
    """A running agent."""

    def __init__(self, spawned: Spawned, on_exit: Callable[[], None]) -> None:
        self.popen = spawned.popen
        self.silent = 0
        self.begun = False
        """It is told what it begins with: before that it understands nothing."""
        self.ready = False
        self._life_fd = spawned.life_fd
        self._pidfd = os.pidfd_open(self.popen.pid)
        self._on_exit = on_exit
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._pidfd, self._exited)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)

    def _exited(self) -> None:
        self._loop.remove_reader(self._pidfd)
        self.popen.wait()
        self._on_exit()
        os.close(self._pidfd)
        os.close(self._life_fd)


class Server:
    """A running fork server, which is this process's child."""

    def __init__(self, process: ServerProcess, on_exit: Callable[[Server, str], None]) -> None:
        process.taken = True
        self.control = process.control
        self.ready = False
        self.pidfd = os.pidfd_open(process.popen.pid)
        self._popen = process.popen
        self._on_exit = on_exit
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self.pidfd, self._exited)

    @property
    def pid(self) -> int:
        return self._popen.pid

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)

    def _exited(self) -> None:
        self._loop.remove_reader(self.pidfd)
        status = status_text(self._popen.wait())
        self._on_exit(self, status)
        self.control.close()
        os.close(self.pidfd)
