"""How ranks of a host, and the carrier beside them, wake each other: two futexes in the windows."""

from __future__ import annotations

import ctypes
import sys

from elastic_ep.exchange.futex import Fence, Futex, yielder
from elastic_ep.exchange.windows import LINE

_LOOK_AGAIN_S = 0.002
"""The longest sleep: if two ranks that arrive last at once ever miss each other, this is what it costs."""


class FutexBell:
    """The count of alarms is the futex that ranks sleep on; that of knocks the one that the carrier does. Nobody needs
    them exact, so they are changed without an atomic operation: who sleeps is woken by the system call, and who is about
    to sleep sees that the count is another."""

    def __init__(self, buffer: memoryview, num_ranks: int) -> None:
        """`buffer`: the windows, writable."""
        self._words = buffer.cast("B")[: (num_ranks + 1) * LINE].cast("q")
        self._word = num_ranks * LINE // 8
        lower_half = 0 if sys.byteorder == "little" else 4
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(buffer)) + self._word * 8 + lower_half
        self._door = self._address + 8
        self._futex = Futex(_LOOK_AGAIN_S)
        self._fence = Fence()
        self._yield = yielder()

    def fence(self) -> None:
        self._fence()

    def alarms(self) -> int:
        return self._words[self._word]

    def raise_alarm(self) -> None:
        self._words[self._word] += 1
        self._futex.wake(self._address)

    def give_way(self) -> None:
        self._yield()

    def sleep(self, alarms: int) -> None:
        self._futex.wait(self._address, alarms & 0xFFFFFFFF)

    def knocks(self) -> int:
        return self._words[self._word + 1]

    def knock(self) -> None:
        """Something was posted."""
        self._words[self._word + 1] += 1
        self._futex.wake(self._door)

    def await_knock(self, knocks: int) -> None:
        """Return soon after a knock has changed `knocks`, or earlier. Releases the GIL."""
        self._futex.wait(self._door, knocks & 0xFFFFFFFF)
