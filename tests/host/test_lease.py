"""Who lives by a lease ends with it, also stopped, also stuck, and with nobody there who would end it."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from elastic_ep.host.lease import FILE, LeasePage
from tests.kit.bound import Bound

EVERY_S = 0.02
LONG_NS, SHORT_NS = 60_000_000_000, 300_000_000
LATE_S = 1.0
"""On a busy machine, until a dead process is seen to have ended; it takes a millisecond else."""
WORK = {
    "computes": "while True: pass",
    "holds the interpreter": "ctypes.PyDLL(None).sleep(60)",
    "waits": "signal.pause()",
}
LIVES = """
import ctypes, signal, sys
from pathlib import Path
from elastic_ep.host.lease import live_by
live_by(Path(sys.argv[1]), float(sys.argv[2]))
print("alive", flush=True)
"""


def now_ns() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


@contextmanager
def living(directory: Path, work: str) -> Iterator[Bound]:
    command = [sys.executable, "-c", LIVES + WORK[work], str(directory), str(EVERY_S)]
    with Bound(command, stdout=subprocess.PIPE) as process:
        try:
            yield process
        finally:
            process.kill()


def ended_at_ns(process: Bound) -> int:
    pidfd = os.pidfd_open(process.pid)
    try:
        assert select.select([pidfd], [], [], 10)[0], "it lives on"
        at_ns = now_ns()
    finally:
        os.close(pidfd)
    assert process.wait() == -signal.SIGKILL
    return at_ns


@pytest.mark.parametrize(
    ("work", "stopped"), [("computes", False), ("holds the interpreter", False), ("waits", True)]
)
def test_it_ends_when_the_lease_that_it_has_seen_does(tmp_path: Path, work: str, stopped: bool) -> None:
    page = LeasePage(tmp_path / FILE, create=True)
    page.renew(until_ns := now_ns() + 8 * SHORT_NS)
    with living(tmp_path, work) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "alive\n"
        if stopped:
            process.send_signal(signal.SIGSTOP)
        assert until_ns <= ended_at_ns(process) < until_ns + LATE_S * 1e9


def test_a_lease_that_is_renewed_goes_on_until_its_new_end(tmp_path: Path) -> None:
    page = LeasePage(tmp_path / FILE, create=True)
    page.renew(now_ns() + LONG_NS)
    with living(tmp_path, "computes") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "alive\n"
        page.renew(until_ns := now_ns() + 4 * SHORT_NS)
        assert until_ns <= ended_at_ns(process) < until_ns + LATE_S * 1e9


@pytest.mark.parametrize("until_ns", [0, 1])
def test_who_begins_when_the_lease_is_over_does_nothing(tmp_path: Path, until_ns: int) -> None:
    LeasePage(tmp_path / FILE, create=True).renew(until_ns)
    with living(tmp_path, "computes") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == ""
        ended_at_ns(process)
