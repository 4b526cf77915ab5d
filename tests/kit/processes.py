"""Processes that a test signals."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

_DEADLINE_S = 20.0


def thread_states(pid: int) -> set[str]:
    """The states of its threads, as letters of /proc."""
    stats = [path.read_text() for path in Path(f"/proc/{pid}/task").glob("*/stat")]
    return {stat.rpartition(")")[2].split()[0] for stat in stats}


def stop(pid: int) -> None:
    """Stop all its threads.

    The signal alone does not: it reaches a thread that runs on another processor only later, and until then
    that one goes on, and answers whoever asks it something.
    """
    os.kill(pid, signal.SIGSTOP)
    limit = time.monotonic() + _DEADLINE_S
    while thread_states(pid) != {"T"}:
        assert time.monotonic() < limit, f"process {pid} was not stopped within {_DEADLINE_S} s"
        time.sleep(0.001)
