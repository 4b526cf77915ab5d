"""The exchange of ranks on one machine: windows in shared memory, a futex to sleep on.

The words are 64 bits wide and never wrap: one that a dead rank left behind stays in the past for ever.
"""

from __future__ import annotations

import mmap
import os
import sys

import numpy as np

from elastic_ep.exchange.base import ExchangeShape
from elastic_ep.exchange.futex import Fence, Futex, yielder
from elastic_ep.exchange.pull import STRIDE, PullExchange
from elastic_ep.exchange.windows import Windows
from elastic_ep.wire.messages import Member

_LOOK_AGAIN_S = 0.002
"""The longest sleep: if two ranks that arrive last at once ever miss each other, this is what it costs."""


class ShmExchange(PullExchange):
    """One rank's end over the windows behind `fd` (see `Windows.create`), which stays the caller's to close.

    Raises ValueError when the file is not laid out for `shape`.
    """

    def __init__(self, fd: int, shape: ExchangeShape, member: Member) -> None:
        total = Windows.layout(shape).total
        size = os.fstat(fd).st_size
        if size != total:
            raise ValueError(f"the exchange windows have {size} bytes, but {shape} needs {total}")
        buffer = memoryview(mmap.mmap(fd, total))
        super().__init__(buffer, shape, member, _FutexBell(buffer, shape.num_ranks))


class _FutexBell:
    """The count of alarms is the futex. Nobody needs it exact, so it is changed without an atomic operation:
    who sleeps is woken by the system call, and who is about to sleep sees that the count is another."""

    def __init__(self, buffer: memoryview, num_ranks: int) -> None:
        self._words = buffer.cast("B").cast("q")
        self._word = num_ranks * STRIDE
        lower_half = 0 if sys.byteorder == "little" else 4
        self._address = np.frombuffer(buffer, np.uint8).ctypes.data + self._word * 8 + lower_half
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
