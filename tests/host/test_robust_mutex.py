"""Robust mutexes, the watch over them, and life lines: with other processes, and real kills."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

import anyio
import anyio.lowlevel
import pytest

from elastic_ep.host import life_line
from elastic_ep.host.death_watch import MUTEX, MUTEX_RELEASED, DeathWatch
from elastic_ep.host.robust_mutex import SLOT_BYTES, Locked, RobustMutexes
from tests.kit.bound import Bound, run
from tests.kit.harness import DEADLINE_S
from tests.kit.processes import stop

pytestmark = pytest.mark.holds_the_loop("a holder's process is started, written to and waited for")
SLOTS = 4
FUTEX_WAITERS = 0x80000000
"""Of the kernel's interface for robust futexes."""
HOLDER = """
import os, sys
from elastic_ep.host.robust_mutex import RobustMutexes
mutexes = RobustMutexes(int(sys.argv[1]), {slots})
if os.fork():
    os.wait()  # the mutex must work from a forked child
else:
    mutexes.lock({slot})
    print(os.getpid(), flush=True)
    if sys.stdin.readline() == "unlock\\n":
        mutexes.unlock({slot})
        print("unlocked", flush=True)
        sys.stdin.readline()
    os._exit(0)
"""


@pytest.fixture
def file() -> Iterator[int]:
    fd = RobustMutexes.create_file(SLOTS)
    yield fd
    os.close(fd)


@contextmanager
def holder(file: int, slot: int) -> Iterator[tuple[int, subprocess.Popen[str]]]:
    """(pid of a forked process that holds the slot, its parent with the child's stdin and stdout)."""
    with Bound(
        [sys.executable, "-c", HOLDER.format(slots=SLOTS, slot=slot), str(file)],
        pass_fds=(file,),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        yield int(process.stdout.readline()), process


def test_owner_killed(file: int) -> None:
    mutexes = RobustMutexes(file, SLOTS)
    mutexes.reset(2)
    with holder(file, 2) as (pid, _):
        os.kill(pid, signal.SIGKILL)
        assert mutexes.lock(2) is Locked.OWNER_DIED
        mutexes.repair(2)
        mutexes.unlock(2)
    assert mutexes.lock(2) is Locked.FREE
    mutexes.unlock(2)


def test_not_repaired_is_lost_until_reset(file: int) -> None:
    mutexes = RobustMutexes(file, SLOTS)
    mutexes.reset(0)
    with holder(file, 0) as (pid, _):
        os.kill(pid, signal.SIGKILL)
        assert mutexes.lock(0) is Locked.OWNER_DIED
    mutexes.unlock(0)
    assert mutexes.lock(0) is Locked.UNRECOVERABLE
    mutexes.reset(0)
    assert mutexes.lock(0) is Locked.FREE
    mutexes.unlock(0)


def test_reset_after_a_death_that_nobody_watched(file: int) -> None:
    mutexes = RobustMutexes(file, SLOTS)
    mutexes.reset(0)
    with holder(file, 0) as (pid, _):
        os.kill(pid, signal.SIGKILL)
    mutexes.reset(0)
    assert mutexes.lock(0) is Locked.FREE
    mutexes.unlock(0)


def test_misuse_is_refused(file: int) -> None:
    mutexes = RobustMutexes(file, SLOTS)
    mutexes.reset(0)
    with pytest.raises(PermissionError):
        mutexes.unlock(0)
    with pytest.raises(OSError, match="Invalid"):
        mutexes.repair(0)
    with pytest.raises(IndexError):
        mutexes.lock(SLOTS)
    with pytest.raises(IndexError):
        mutexes.lock(-1)


class Watch:
    """A death watch on slot 1, and what it says."""

    def __init__(self, file: int) -> None:
        self.mutexes = RobustMutexes(file, SLOTS)
        self.mutexes.reset(1)
        self.watch = DeathWatch(self.mutexes, asyncio.get_running_loop())
        self.deaths: list[tuple[str, int]] = []
        self.told = 0
        self.released = anyio.Event()

    def begin(self) -> None:
        self.watch.watch(
            1, lambda cause, at_ns: self.deaths.append((cause, at_ns)), self.released.set, self.tell
        )
        assert self.watch.busy_slots == {1}

    def tell(self) -> None:
        """On the watching thread, before anything else is heard of the death there."""
        assert threading.current_thread() is not threading.main_thread()
        self.told += 1

    async def end(self) -> tuple[str, int]:
        with anyio.fail_after(DEADLINE_S):
            await self.released.wait()
        assert self.watch.busy_slots == set()
        assert len(self.deaths) == 1
        return self.deaths[0]


async def somebody_waits(file: int, slot: int) -> None:
    """Until a thread blocks on the mutex: whoever does marks the word that its lock is."""
    with anyio.fail_after(DEADLINE_S):
        while not int.from_bytes(os.pread(file, 4, slot * SLOT_BYTES), sys.byteorder) & FUTEX_WAITERS:
            await anyio.lowlevel.checkpoint()


def watch_test(body: Callable[[Watch, int], Awaitable[None]], file: int) -> None:
    async def main() -> None:
        await body(Watch(file), file)

    anyio.run(main)


def test_watch_notices_a_kill(file: int) -> None:
    async def body(watch: Watch, file: int) -> None:
        with holder(file, 1) as (pid, _):
            watch.begin()
            await somebody_waits(file, 1)  # a death before that is another test
            assert watch.deaths == []
            killed_ns = time.monotonic_ns()
            os.kill(pid, signal.SIGKILL)
            cause, at_ns = await watch.end()
        assert cause == MUTEX
        assert watch.told == 1
        assert 0 < at_ns - killed_ns < 1e9
        assert watch.mutexes.lock(1) is Locked.FREE  # repaired
        watch.mutexes.unlock(1)

    watch_test(body, file)


def test_watch_that_begins_after_the_death(file: int) -> None:
    async def body(watch: Watch, file: int) -> None:
        with holder(file, 1) as (pid, _):
            os.kill(pid, signal.SIGKILL)
        watch.begin()
        assert (await watch.end())[0] == MUTEX

    watch_test(body, file)


def test_watch_sees_the_owner_let_go(file: int) -> None:
    async def body(watch: Watch, file: int) -> None:
        with holder(file, 1) as (_, process):
            watch.begin()
            assert process.stdin is not None
            process.stdin.write("unlock\n")
            process.stdin.flush()
            assert (await watch.end())[0] == MUTEX_RELEASED
        assert watch.told == 0, "the owner lives, and could still write to those who mask it"

    watch_test(body, file)


WATCHER = """
import asyncio, sys
from elastic_ep.host.death_watch import DeathWatch
from elastic_ep.host.robust_mutex import RobustMutexes
async def main():
    watch = DeathWatch(RobustMutexes(int(sys.argv[1]), 4), asyncio.get_running_loop())
    watch.watch(3, lambda *_: print("death"), lambda: None, lambda: print("told"))
asyncio.run(main())
"""


def test_a_blocked_watcher_does_not_keep_the_interpreter(file: int) -> None:
    RobustMutexes(file, SLOTS).reset(3)
    with holder(file, 3):
        done = run([sys.executable, "-c", WATCHER, str(file)], DEADLINE_S, pass_fds=(file,))
    assert done.returncode == 0
    assert done.stdout == ""
    assert done.stderr == ""


BOUND = """
import signal, sys
from elastic_ep.host import life_line
life_line.bind(int(sys.argv[1]))
print("bound", flush=True)
signal.pause()
"""


def bound(read_end: int) -> subprocess.Popen[str]:
    return Bound([sys.executable, "-c", BOUND, str(read_end)], pass_fds=(read_end,), stdout=subprocess.PIPE)


def test_a_stopped_process_dies_with_its_life_line() -> None:
    read_end, write_end = life_line.create()
    with bound(read_end) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "bound\n"
        os.close(read_end)
        stop(process.pid)
        os.close(write_end)
        assert process.wait(DEADLINE_S) == -signal.SIGKILL


def test_a_life_line_that_is_cut_before_it_is_bound() -> None:
    read_end, write_end = life_line.create()
    assert not life_line.is_cut(read_end)
    os.close(write_end)
    assert life_line.is_cut(read_end)
    with bound(read_end) as process:
        assert process.wait(DEADLINE_S) == -signal.SIGKILL
    os.close(read_end)
