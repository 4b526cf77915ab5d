"""The clock that all machines of the run process go by: `LivedTime` over this machine's monotonic clock."""

from __future__ import annotations

import time
from collections.abc import Callable

from elastic_ep.machines.lived_time import LivedTime


def monotonic_ms() -> float:
    return time.monotonic() * 1000


class Clock:
    """`reading_ms` is the clock below. Milliseconds."""

    def __init__(self, reading_ms: Callable[[], float] = monotonic_ms) -> None:
        self._reading_ms = reading_ms
        self._lived = LivedTime()
        self._told_ms = 0.0

    def now_ms(self) -> int:
        """While whoever `rest`s is held up, this clock stands still."""
        return int(self._lived.at(self._reading_ms()))

    def rest(self, for_s: float) -> None:
        """The watch over progress goes to sleep, for so long."""
        self._lived.rest(self._reading_ms(), for_s * 1000)

    def held_up_ms(self) -> int:
        """For how long it was held up since this was last asked."""
        self._lived.at(self._reading_ms())
        held_up_ms, self._told_ms = self._lived.lost_ms - self._told_ms, self._lived.lost_ms
        return round(held_up_ms)
