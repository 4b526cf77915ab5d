"""Robust, process-shared pthread mutexes in shared memory: the fastest notice of a process's death.

The kernel hands a robust mutex over when the thread that holds it dies, early in the exit, before the process's
memory and files are taken down. So this says "dead" well before a socket or a pidfd does.

HAZARD: the mutex belongs to the *thread* that locked it: a thread that lives as long as its process. Lock after
the fork, in the child.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from enum import Enum

SLOT_BYTES = 64
"""A cache line each; glibc's pthread_mutex_t takes 40 bytes on x86-64 and 48 on aarch64."""

_PTHREAD_PROCESS_SHARED = 1
_PTHREAD_MUTEX_ROBUST = 1
_ATTRIBUTE_BYTES = 64

# CDLL (not PyDLL) releases the interpreter lock during each call; a watcher blocks without holding it.
_libc = ctypes.CDLL(None)


class Locked(Enum):
    """How a lock was obtained."""

    FREE = "free"
    OWNER_DIED = "owner died"
    UNRECOVERABLE = "unrecoverable"
    """The owner died and the next one did not repair the mutex. It is not held."""


class RobustMutexes:
    """An array of mutexes in one shared memory file. Every process maps it for itself.

    `fd` is a file of at least `slots * SLOT_BYTES` bytes; it may be closed afterwards. The mapping lives as long
    as this object: a thread that blocks in `lock` keeps it alive.
    """

    def __init__(self, fd: int, slots: int) -> None:
        self.slots = slots
        self._map = mmap.mmap(fd, slots * SLOT_BYTES)
        self._anchor = ctypes.c_char.from_buffer(self._map)
        self._base = ctypes.addressof(self._anchor)

    @staticmethod
    def create_file(slots: int) -> int:
        """A new anonymous file with room for `slots` mutexes. The caller closes it."""
        fd = os.memfd_create("eep-mutexes", os.MFD_CLOEXEC)
        os.ftruncate(fd, slots * SLOT_BYTES)
        return fd

    def reset(self, slot: int) -> None:
        """Make the slot a new, free mutex. Nobody may hold it or wait for it. Raises OSError."""
        ctypes.memset(self._address(slot), 0, SLOT_BYTES)
        attributes = ctypes.create_string_buffer(_ATTRIBUTE_BYTES)
        _check(_libc.pthread_mutexattr_init(attributes))
        try:
            _check(_libc.pthread_mutexattr_setpshared(attributes, _PTHREAD_PROCESS_SHARED))
            _check(_libc.pthread_mutexattr_setrobust(attributes, _PTHREAD_MUTEX_ROBUST))
            _check(_libc.pthread_mutex_init(ctypes.c_void_p(self._address(slot)), attributes))
        finally:
            _libc.pthread_mutexattr_destroy(attributes)

    def lock(self, slot: int) -> Locked:
        """Block until this thread holds the mutex or it is `UNRECOVERABLE`. Raises OSError.

        After `OWNER_DIED`, call `repair` before `unlock`.
        """
        code = _libc.pthread_mutex_lock(ctypes.c_void_p(self._address(slot)))
        if code == errno.EOWNERDEAD:
            return Locked.OWNER_DIED
        if code == errno.ENOTRECOVERABLE:
            return Locked.UNRECOVERABLE
        _check(code)
        return Locked.FREE

    def repair(self, slot: int) -> None:
        """Mark a mutex whose owner died as sound again. Its holder only. Raises OSError."""
        _check(_libc.pthread_mutex_consistent(ctypes.c_void_p(self._address(slot))))

    def unlock(self, slot: int) -> None:
        """Raises OSError if this thread does not hold it."""
        _check(_libc.pthread_mutex_unlock(ctypes.c_void_p(self._address(slot))))

    def _address(self, slot: int) -> int:
        if not 0 <= slot < self.slots:
            raise IndexError(f"mutex slot {slot} of {self.slots}")
        return self._base + slot * SLOT_BYTES


def _check(code: int) -> None:
    if code != 0:
        raise OSError(code, os.strerror(code))
