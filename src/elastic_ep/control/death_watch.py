"""A thread for each watched process that blocks on the process's robust mutex and reports its death.

Threads, because no file descriptor becomes readable when a robust mutex is handed over. They cost a stack each
and no processor time.
"""

from __future__ import annotations

import _thread
import asyncio
import time
from collections.abc import Callable
from contextlib import suppress

from elastic_ep.control.robust_mutex import Locked, RobustMutexes

MUTEX = "mutex"
"""Cause: the kernel handed the mutex over, so the owner's main thread is dead."""

MUTEX_RELEASED = "mutex released"
"""Cause: the mutex was free, so its owner let go of it or never took it."""


class DeathWatch:
    """Watches slots of `mutexes`. Callbacks run on `loop`.

    `busy_slots` are those that a thread still uses: they must not be reset.
    """

    def __init__(self, mutexes: RobustMutexes, loop: asyncio.AbstractEventLoop) -> None:
        self.busy_slots: set[int] = set()
        self._mutexes = mutexes
        self._loop = loop

    def watch(self, slot: int, on_death: Callable[[str, int], None], on_released: Callable[[], None]) -> None:
        """Call `on_death(cause, at_ns)` once when the owner of `slot` is dead, later `on_released()`.

        `at_ns` is CLOCK_MONOTONIC. `on_released` says that the slot may be used again. Call this only when the
        owner is known to hold the mutex, else it is taken for dead at once. An owner that has died before is
        reported at once as well.
        """
        self.busy_slots.add(slot)

        def released() -> None:
            self.busy_slots.discard(slot)
            on_released()

        # Not threading.Thread: its start() waits until the new thread has run, which under load takes as long
        # as a time slice, and interpreter exit would know of it. This kind is forgotten at exit.
        _thread.start_new_thread(self._block, (slot, on_death, released))

    def _block(self, slot: int, on_death: Callable[[str, int], None], released: Callable[[], None]) -> None:
        how = self._mutexes.lock(slot)
        at_ns = time.monotonic_ns()
        cause = MUTEX_RELEASED if how is Locked.FREE else MUTEX
        # RuntimeError: the loop is closed, nobody wants to know any more.
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(on_death, cause, at_ns)
        if how is Locked.OWNER_DIED:
            self._mutexes.repair(slot)
        if how is not Locked.UNRECOVERABLE:
            self._mutexes.unlock(slot)
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(released)
