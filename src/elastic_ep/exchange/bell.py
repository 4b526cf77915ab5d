"""How ranks of a host, and the carrier beside them, wake each other: a futex in the windows."""

from __future__ import annotations

import ctypes
import sys

from elastic_ep.exchange.futex import Fence, Futex, yielder
from elastic_ep.exchange.windows import LINE

_LOOK_AGAIN_S = 0.002
"""The longest sleep: if two ranks that arrive last at once ever miss each other, this is what it costs."""


class FutexBell:
    """The count of alarms is the futex. Nobody needs it exact, so it is changed without an atomic operation:
    who sleeps is woken by the system call, and who is about to sleep sees that the count is another."""

    def __init__(self, buffer: memoryview, num_ranks: int) -> None:
        """`buffer`: the windows, writable."""
        self._words = buffer.cast("B")[: (num_ranks + 1) * LINE].cast("q")
        self._word = num_ranks * LINE // 8
        lower_half = 0 if sys.byteorder == "little" else 4
        self._address = ctypes.addressof(ctypes.c_char.from_buffer(buffer)) + self._word * 8 + lower_half
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
