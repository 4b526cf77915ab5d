"""The process of a fork server, begun before there is anything to tell it: its imports take most of a start."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress

# A library that starts threads at import would make the fork server unfit to fork, and each rank computes with
# one thread anyway.
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class ServerProcess:
    """Imports `modules` and then asks over `control` for its options. Raises OSError when it cannot be started.

    Who takes it over closes `control`, which is its end, and waits for `popen`.
    """

    def __init__(self, modules: tuple[str, ...], environment: Mapping[str, str] | None = None) -> None:
        self.control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.taken = False
        try:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "elastic_ep.host.fork_server", str(theirs.fileno()), *modules],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                process_group=0,  # not a session: see the fork server
                env={**os.environ, **_ONE_THREAD, **(environment or {})},
            )
        except OSError:
            self.control.close()
            raise
        finally:
            theirs.close()


@contextmanager
def begun(modules: tuple[str, ...]) -> Iterator[ServerProcess | None]:
    """One for the launcher to take; it ends if nobody does. None if it cannot be started, which is said later."""
    server = None
    with suppress(OSError):
        server = ServerProcess(modules)
    try:
        yield server
    finally:
        if server is not None and not server.taken:
            server.control.close()
            server.popen.kill()
            server.popen.wait()
