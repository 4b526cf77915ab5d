"""Until when the ranks of a host that has joined may go on: a page of memory, and an alarm of the kernel's in each.

The keeper writes into the page until when the host's lease lasts. A rank has the kernel send it SIGKILL then, and puts
that off when the page says so. So a rank ends with its lease whatever becomes of keeper and agent, on a machine that is
too busy for either, and also when it is stopped itself: from the interrupt of the clock on, none of its threads runs on.

Times are CLOCK_BOOTTIME nanoseconds, which a sleeping machine does not stop.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import struct
import threading
import time
from pathlib import Path

from elastic_ep.host.scheduling import make_prompt

FILE = "lease"
_BYTES = 8
_TIMER_ABSTIME = 1
_SIGEV_SIGNAL = 0
_SIGEVENT = struct.Struct("Pii48x")
"""Value, signal, how it is told."""
_ITIMERSPEC = struct.Struct("qqqq")
"""How often again, and when: seconds and nanoseconds each."""
_librt = ctypes.CDLL("librt.so.1", use_errno=True)


class LeasePage:
    """In the file `path`. Whoever made it writes, ranks read."""

    def __init__(self, path: Path, *, create: bool = False) -> None:
        """Raises OSError."""
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT if create else 0), 0o600)
        try:
            if create:
                os.ftruncate(fd, _BYTES)
            self._word = ctypes.c_int64.from_buffer(mmap.mmap(fd, _BYTES))  # written whole or not at all
        finally:
            os.close(fd)

    @property
    def until_ns(self) -> int:
        return self._word.value

    def renew(self, until_ns: int) -> None:
        self._word.value = until_ns


class Alarm:
    """This process's: SIGKILL at `until_ns` as it was last set; at once if that has passed."""

    def __init__(self) -> None:
        """Nothing is set yet. Raises OSError."""
        event = _SIGEVENT.pack(0, signal.SIGKILL, _SIGEV_SIGNAL)
        self._timer = ctypes.c_void_p()
        _check(_librt.timer_create(time.CLOCK_BOOTTIME, event, ctypes.byref(self._timer)))

    def set(self, until_ns: int) -> None:
        """Raises OSError."""
        # HAZARD: 0 would mean no alarm at all.
        when = _ITIMERSPEC.pack(0, 0, *divmod(max(1, until_ns), 1_000_000_000))
        _check(_librt.timer_settime(self._timer, _TIMER_ABSTIME, when, None))


def live_by(directory: Path, every_s: float) -> None:
    """From now on this process ends with the lease in `directory`. It looks so often whether that is longer by now.

    Call it before anything that must not outlast the lease. Raises OSError.
    """
    page, alarm = LeasePage(directory / FILE), Alarm()
    alarm.set(page.until_ns)

    def follow() -> None:
        make_prompt()
        while True:
            time.sleep(every_s)
            alarm.set(page.until_ns)

    threading.Thread(target=follow, name="lease", daemon=True).start()


def _check(status: int) -> None:
    if status:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
