"""Sleeping on a word of shared memory: Linux' futex system call through ctypes.

Waiting releases the GIL (`ctypes.CDLL`), so that the control loop of the process runs while the forward thread
sleeps. Waking does not (`ctypes.PyDLL`): the call is short, and giving up the GIL could cost the forward thread
a whole switch interval.
"""

from __future__ import annotations

import ctypes
import platform
import threading
from collections.abc import Callable

_NUMBERS = {"x86_64": 202, "aarch64": 98, "riscv64": 98, "ppc64le": 221, "s390x": 238}
_WAIT = 0
_WAKE = 1
_EVERYBODY = 2**31 - 1


class _Timespec(ctypes.Structure):
    _fields_ = (("tv_sec", ctypes.c_long), ("tv_nsec", ctypes.c_long))


def _system_call(library: ctypes.CDLL) -> ctypes._NamedFuncPointer:
    call = library.syscall
    call.restype = ctypes.c_long
    call.argtypes = (
        ctypes.c_long, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint32,
        ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint32,
    )  # fmt: skip
    return call


class Fence:
    """A memory barrier, which Python lacks: freeing a lock and taking it again is one on every machine."""

    def __init__(self) -> None:
        self._lock = threading.Lock()

    def __call__(self) -> None:
        """Other processes see everything before this call before anything after it."""
        with self._lock:
            pass
        with self._lock:
            pass


def yielder() -> Callable[[], int]:
    """`sched_yield`, giving up the GIL too."""
    call = ctypes.CDLL(None).sched_yield
    call.argtypes = ()
    return call


class Futex:
    """Shared (not process-private) futexes. One object for any number of words; threads may share it.

    Raises OSError on a machine whose system call number is not known here.
    """

    def __init__(self, timeout_s: float) -> None:
        """`timeout_s` is how long one `wait` lasts at most."""
        machine = platform.machine()
        if machine not in _NUMBERS:
            raise OSError(f"the number of the futex system call is not known on {machine}")
        self._number = _NUMBERS[machine]
        self._sleep = _system_call(ctypes.CDLL(None))
        self._rouse = _system_call(ctypes.PyDLL(None))
        nanoseconds = round(timeout_s * 1e9)
        self._timeout = _Timespec(nanoseconds // 10**9, nanoseconds % 10**9)
        self._timeout_at = ctypes.addressof(self._timeout)

    def wait(self, address: int, value: int) -> None:
        """Sleep while the 32 bits at `address` are `value`, until woken or timed out. May return early."""
        self._sleep(self._number, address, _WAIT, value, self._timeout_at, None, 0)

    def wake(self, address: int) -> None:
        """Wake all threads of all processes that sleep on `address`."""
        self._rouse(self._number, address, _WAKE, _EVERYBODY, None, None, 0)
