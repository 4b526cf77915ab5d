"""Of what many tasks have to do at once on the event loop, some a turn of it: others have theirs in between."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

_T = TypeVar("_T")
TURN_S = 0.003
"""So much is done in a turn, and at least one piece of work."""


class Turns:
    """For one event loop. What is given to `run` should take no more than a few milliseconds each."""

    def __init__(self) -> None:
        self._spent_s = 0.0
        """In this turn."""

    async def run(self, work: Callable[[], _T]) -> _T:
        """What `work()` returns, called in this turn or a later one."""
        while self._spent_s >= TURN_S:  # noqa: ASYNC110  # the next turn is what is waited for
            await asyncio.sleep(0)
        began = time.monotonic()
        try:
            return work()
        finally:
            self._spent(time.monotonic() - began)

    def _spent(self, seconds: float) -> None:
        if not self._spent_s:
            asyncio.get_running_loop().call_soon(self._next_turn)
        self._spent_s += seconds

    def _next_turn(self) -> None:
        self._spent_s = 0.0
