"""How soon a thread gets a processor when it has something to do. No privileges needed."""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import threading

SHORT_SLICE_NS = 100_000
"""The shortest that Linux accepts."""

_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274}
_ATTRIBUTES = struct.Struct("IIQiIQQQ")
_SCHED_OTHER = 0


def make_prompt() -> bool:
    """Let the calling thread preempt others when it wakes up; False where the system does not offer it.

    Linux 6.12 and later let an ordinary thread ask for a short slice: it gets no more processor time for that,
    only an earlier deadline. HAZARD: threads and processes that this one starts later inherit it, as they do its
    niceness; what computes should call `make_ordinary`.
    """
    return _set_slice(SHORT_SLICE_NS)


def make_ordinary() -> bool:
    """Undo `make_prompt` for the calling thread."""
    return _set_slice(0)


def _set_slice(nanoseconds: int) -> bool:
    number = _SCHED_SETATTR.get(platform.machine())
    if number is None:
        return False
    nice = os.getpriority(os.PRIO_PROCESS, threading.get_native_id())
    attributes = _ATTRIBUTES.pack(_ATTRIBUTES.size, _SCHED_OTHER, 0, nice, 0, nanoseconds, 0, 0)
    return bool(ctypes.CDLL(None).syscall(ctypes.c_long(number), 0, attributes, 0) == 0)
