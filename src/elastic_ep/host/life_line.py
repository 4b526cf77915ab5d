"""A pipe that ties one process's life to another's, enforced by the kernel.

The holder keeps the only write end. The bound process asks the kernel for SIGKILL as the read end's IO signal
(fcntl F_SETSIG with O_ASYNC): when the last write end closes, by the holder's exit, its SIGKILL or on purpose,
the bound process dies, also when it is stopped or stuck in native code, and without a thread or a poll in it.
PR_SET_PDEATHSIG cannot do this: it follows the parent, and ranks outlive their fork server.
"""

from __future__ import annotations

import fcntl
import os
import select
import signal

_F_SETSIG = 10


def create() -> tuple[int, int]:
    """(read end, write end), both closed on exec."""
    return os.pipe2(os.O_CLOEXEC)


def bind(read_end: int) -> None:
    """From now on this process dies when the write end closes; at once if it is closed already.

    A socket serves too, as long as nothing is sent to it.

    HAZARD: owner and signal belong to the open file, not to the descriptor: one pipe for each bound process.
    """
    fcntl.fcntl(read_end, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(read_end, _F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(read_end, fcntl.F_SETFL, fcntl.fcntl(read_end, fcntl.F_GETFL) | os.O_ASYNC)
    if is_cut(read_end):
        os.kill(os.getpid(), signal.SIGKILL)


def release(read_end: int) -> None:
    """Undo `bind`."""
    fcntl.fcntl(read_end, fcntl.F_SETFL, fcntl.fcntl(read_end, fcntl.F_GETFL) & ~os.O_ASYNC)


def is_cut(read_end: int) -> bool:
    """Whether every write end is closed. Does not block."""
    poll = select.poll()
    poll.register(read_end, 0)
    return bool(poll.poll(0))
