"""The exchange inside one process: for unit tests, and for a group of one rank."""

from __future__ import annotations

import threading

from elastic_ep.exchange.base import ExchangeShape
from elastic_ep.exchange.pull import PullExchange
from elastic_ep.exchange.windows import Windows
from elastic_ep.wire.messages import Member


class LoopbackHub:
    """What the ends have in common. Each end is for one thread, like an exchange of a rank's own process."""

    def __init__(self, shape: ExchangeShape) -> None:
        self.shape = shape
        self._buffer = memoryview(bytearray(Windows.layout(shape).total))
        self._bell = _ConditionBell()

    def end(self, member: Member) -> PullExchange:
        """A new end for `member`. The end of an earlier incarnation must no longer be used."""
        return PullExchange(self._buffer, self.shape, member, self._bell)


class _ConditionBell:
    """One for all ends. Threads need no fence: the interpreter orders them."""

    def __init__(self) -> None:
        self._count = 0
        self._news = threading.Condition()

    def alarms(self) -> int:
        return self._count

    def raise_alarm(self) -> None:
        with self._news:
            self._count += 1
            self._news.notify_all()

    def give_way(self) -> None:
        pass

    def sleep(self, alarms: int) -> None:
        with self._news:
            self._news.wait_for(lambda: self._count != alarms)

    def fence(self) -> None:
        pass
