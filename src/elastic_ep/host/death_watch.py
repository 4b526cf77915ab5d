"""Both ends of the death notice: a thread in each rank that holds its robust mutex, one here that waits for it.

Threads, because no file descriptor becomes readable when a robust mutex is handed over. They cost a stack each
and no processor time. On busy processors most of the notice's latency is the wait for one, twice: the dying thread
must run to give the mutex up, then the watcher. So both are threads that have always slept and that ask for a
short slice; a rank's main thread, nicer and busier, would take tens of milliseconds to die.
"""

from __future__ import annotations

import _thread
import asyncio
import signal
import time
from collections.abc import Callable
from contextlib import suppress

from elastic_ep.host.robust_mutex import Locked, RobustMutexes
from elastic_ep.host.scheduling import make_prompt

MUTEX = "mutex"
"""Cause: the kernel handed the mutex over, so the owner is dying."""

MUTEX_RELEASED = "mutex released"
"""Cause: the mutex was free, so its owner let go of it or never took it."""


def hold_until_death(mutexes: RobustMutexes, slot: int) -> None:
    """Hold the mutex on a thread of its own until this process dies; returns when it is held.

    Call this after the fork, and before the process makes itself nice: the thread keeps the present niceness.
    """
    held = _thread.allocate_lock()
    held.acquire()
    forever = _thread.allocate_lock()
    forever.acquire()

    def hold() -> None:
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # they are for the main thread
        make_prompt()
        mutexes.lock(slot)
        held.release()
        forever.acquire()

    _thread.start_new_thread(hold, ())
    held.acquire()


class DeathWatch:
    """Watches slots of `mutexes`. Callbacks run on `loop`.

    `busy_slots` are those that a thread still uses: they must not be reset.
    """

    def __init__(self, mutexes: RobustMutexes, loop: asyncio.AbstractEventLoop) -> None:
        self.busy_slots: set[int] = set()
        self._mutexes = mutexes
        self._loop = loop

    def watch(
        self,
        slot: int,
        on_death: Callable[[str, int], None],
        on_released: Callable[[], None],
        tell: Callable[[], None],
    ) -> None:
        """Call `on_death(cause, at_ns)` once when the owner of `slot` is dead, later `on_released()`.

        `at_ns` is CLOCK_MONOTONIC. `on_released` says that the slot may be used again. Call this only when the
        owner is known to hold the mutex, else it is taken for dead at once. An owner that has died before is
        reported at once as well. `tell` is called on the watching thread, and only if the kernel says that the owner
        has died: for those who cannot wait for the loop.
        """
        self.busy_slots.add(slot)

        def released() -> None:
            self.busy_slots.discard(slot)
            on_released()

        # Not threading.Thread: its start() waits until the new thread has run, which under load takes as long
        # as a time slice, and interpreter exit would know of it. This kind is forgotten at exit.
        _thread.start_new_thread(self._block, (slot, on_death, released, tell))

    def _block(
        self,
        slot: int,
        on_death: Callable[[str, int], None],
        released: Callable[[], None],
        tell: Callable[[], None],
    ) -> None:
        make_prompt()
        how = self._mutexes.lock(slot)
        at_ns = time.monotonic_ns()
        cause = MUTEX_RELEASED if how is Locked.FREE else MUTEX
        # RuntimeError: the loop is closed, nobody wants to know any more.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(on_death, cause, at_ns)
        if how is Locked.OWNER_DIED:
            # Second, so that the controller has lost the member before it hears of a step that did without.
            tell()
            self._mutexes.repair(slot)
        if how is not Locked.UNRECOVERABLE:
            self._mutexes.unlock(slot)
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(released)
