"""The exchange of ranks on one machine: windows in shared memory, a futex on every rank's word."""

from __future__ import annotations

import mmap
import os
import platform
import sys
import threading

import numpy as np

from elastic_ep.exchange.base import ExchangeShape
from elastic_ep.exchange.futex import Futex
from elastic_ep.exchange.pull import STRIDE, PullExchange
from elastic_ep.exchange.windows import Windows
from elastic_ep.messages import Member

_LOOK_AGAIN_S = 0.002
"""A mask that is set between a waiter's last look and its sleep wakes nobody; it is seen after this time."""


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
        super().__init__(buffer, shape, member, _FutexBell(buffer))


class _FutexBell:
    """Words of 64 bits, so that they never wrap: a word that a dead rank left behind stays in the past for ever.

    The futex looks at the lower half only, which is enough: it changes with every operation.
    """

    def __init__(self, buffer: memoryview) -> None:
        self._words = buffer.cast("B").cast("q")
        lower_half = 0 if sys.byteorder == "little" else 4
        self._address = np.frombuffer(buffer, np.uint8).ctypes.data + lower_half
        self._futex = Futex(_LOOK_AGAIN_S)
        # x86-64 keeps stores in order. Elsewhere taking and freeing a lock does.
        self._ordered = platform.machine() == "x86_64"
        self._fence = threading.Lock()

    def post(self, rank: int, number: int) -> None:
        if not self._ordered:
            with self._fence:
                pass
        self._words[rank * STRIDE] = number
        self._futex.wake(self._address + rank * STRIDE * 8)

    def wait(self, rank: int, number: int, live: list[bool]) -> None:
        words, word, address = self._words, rank * STRIDE, self._address + rank * STRIDE * 8
        while live[rank] and (seen := words[word]) < number:
            self._futex.wait(address, seen & 0xFFFFFFFF)
        if not self._ordered:
            with self._fence:
                pass

    def ring(self, rank: int) -> None:
        self._futex.wake(self._address + rank * STRIDE * 8)

    def close(self) -> None:
        """The mapping goes with the last array over it."""
