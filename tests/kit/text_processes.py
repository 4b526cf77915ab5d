"""Processes that read large bodies, forked from one that has imported all they need: to start one takes a second of a
processor otherwise. What their start does is for those tests that do without this.

As a script: `python -m tests.kit.text_processes SOCKET_FD` is the process that forks.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import threading
import traceback
import weakref
from contextlib import suppress

from elastic_ep.gateway import text_process
from tests.gateway import fakes
from tests.kit.bound import Bound

__all__ = ["fakes"]  # what tests send a text by


class Forked:
    """What a `TextWorker` asks of a `subprocess.Popen`."""

    def __init__(self, pid: int, pidfd: int) -> None:
        self.pid = pid
        self._pidfd = pidfd
        self._poll = select.poll()
        self._poll.register(pidfd, select.POLLIN)
        weakref.finalize(self, os.close, pidfd)

    def poll(self) -> int | None:
        return 0 if self._poll.poll(0) else None

    def wait(self) -> None:
        self._poll.poll()

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)


class TextProcesses:
    """`start` stands in for `text_worker._spawn`; the process that forks begins with the first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._forks: Bound | None = None
        self._control: socket.socket

    def start(self, socket_fd: int, life_fd: int) -> Forked:
        with self._lock:
            if self._forks is None:
                self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                with theirs:
                    fd = theirs.fileno()
                    command = [sys.executable, "-m", __name__, str(fd)]
                    env = {
                        **os.environ,
                        "PYTHONPATH": os.pathsep.join(sys.path),
                        "TOKENIZERS_PARALLELISM": "false",
                    }
                    self._forks = Bound(command, pass_fds=(fd,), env=env)
            socket.send_fds(self._control, [b"fork"], [socket_fd, life_fd])
            answer, (pidfd,), _, _ = socket.recv_fds(self._control, 16, 1)
        return Forked(int(answer), pidfd)

    def close(self) -> None:
        if self._forks is not None:
            self._control.close()
            self._forks.wait()


def main(control: socket.socket) -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for them but by their pidfd
    while True:
        asked, fds, _, _ = socket.recv_fds(control, 16, 2)
        if not asked:
            return
        pid = os.fork()
        if pid == 0:
            _become(control, *fds)
        # It lives: until the answer is heard nobody ends it.
        pidfd = os.pidfd_open(pid)
        socket.send_fds(control, [str(pid).encode()], [pidfd])
        for fd in (pidfd, *fds):
            os.close(fd)


def _become(control: socket.socket, socket_fd: int, life_fd: int) -> None:
    status = 1
    try:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        control.close()
        status = text_process.main(socket_fd, life_fd)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


if __name__ == "__main__":
    main(socket.socket(fileno=int(sys.argv[1])))
