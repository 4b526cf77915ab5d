"""What ranks tell the carrier of their host: whom they have masked. Behind the windows, if ranks are on several hosts.

The carrier copies what ranks of other hosts have sent into the windows of its own (`mirror.py`). A rank that has
masked such a sender goes on without it, and what the sender owned may be another's in the next step. So when `mask`
returns, nothing of that incarnation is written for this rank any more, nor ever will be: the carrier writes under a
lock, and looks at the masks under it.

The lock is the kernel's (flock), so a carrier that is killed holds it no longer.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

from elastic_ep.exchange.base import ExchangeShape
from elastic_ep.exchange.futex import Fence
from elastic_ep.exchange.windows import Windows
from elastic_ep.wire.messages import Member

_PATIENCE_S = 5.0
_PAUSE_S = 0.00005


class CarrierHangs(RuntimeError):
    """The carrier of this host has stopped in the middle of a write: its host is as good as lost."""


class Carried:
    """One process's view of the masks; `fd` are windows made with `carried=True`, and stay the caller's to close."""

    def __init__(self, fd: int, shape: ExchangeShape) -> None:
        windows = Windows.layout(shape)
        # A description of its own: locks of one description do not exclude each other.
        self._fd = os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        weakref.finalize(self, os.close, self._fd)
        self._ranks = shape.num_ranks
        self._map = mmap.mmap(self._fd, windows.carried_total, offset=0)
        self._masks = memoryview(self._map)[windows.total : windows.total + 8 * self._ranks**2].cast("q")
        self._fence = Fence()

    @staticmethod
    def is_there(fd: int, shape: ExchangeShape) -> bool:
        return os.fstat(fd).st_size == Windows.layout(shape).carried_total

    def mask(self, me: int, member: Member) -> None:
        """Any thread. Raises `CarrierHangs`."""
        at = me * self._ranks + member.rank
        self._masks[at] = max(self._masks[at], member.incarnation)
        self._fence()
        limit = time.monotonic() + _PATIENCE_S
        while not self._try_lock():
            if time.monotonic() > limit:
                raise CarrierHangs(
                    f"the carrier of this host has not let go of the windows in {_PATIENCE_S:g} s"
                )
            time.sleep(_PAUSE_S)
        fcntl.flock(self._fd, fcntl.LOCK_UN)

    def is_masked(self, me: int, member: Member) -> bool:
        """Whether rank `me` has masked this incarnation, or a later one."""
        return self._masks[me * self._ranks + member.rank] >= member.incarnation

    @contextmanager
    def held(self) -> Iterator[None]:
        """By the carrier while it writes for ranks that have not masked the sender."""
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        try:
            yield
        finally:
            fcntl.flock(self._fd, fcntl.LOCK_UN)

    def _try_lock(self) -> bool:
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
