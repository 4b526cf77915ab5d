"""The exchange inside one process: for unit tests, and for a group of one rank."""

from __future__ import annotations

import threading

from elastic_ep.exchange.base import ExchangeShape
from elastic_ep.exchange.pull import STRIDE, PullExchange
from elastic_ep.exchange.windows import Windows
from elastic_ep.messages import Member


class LoopbackHub:
    """What the ends have in common. Each end is for one thread, like an exchange of a rank's own process."""

    def __init__(self, shape: ExchangeShape) -> None:
        self.shape = shape
        self._buffer = memoryview(bytearray(Windows.layout(shape).total))
        self._news = threading.Condition()

    def end(self, member: Member) -> PullExchange:
        """A new end for `member`. The end of an earlier incarnation must no longer be used."""
        return PullExchange(self._buffer, self.shape, member, _ConditionBell(self._buffer, self._news))


class _ConditionBell:
    def __init__(self, buffer: memoryview, news: threading.Condition) -> None:
        self._words = buffer.cast("B").cast("q")
        self._news = news

    def post(self, rank: int, number: int) -> None:
        with self._news:
            self._words[rank * STRIDE] = number
            self._news.notify_all()

    def wait(self, rank: int, number: int, live: list[bool]) -> None:
        with self._news:
            self._news.wait_for(lambda: self._words[rank * STRIDE] >= number or not live[rank])

    def ring(self, rank: int) -> None:
        with self._news:
            self._news.notify_all()

    def close(self) -> None:
        """Nothing to release."""
