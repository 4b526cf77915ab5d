"""An event loop whose time jumps to the next timer when there is nothing else to do: minutes pass in no time."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class _Jumping(selectors.DefaultSelector):
    def __init__(self) -> None:
        super().__init__()
        self.now_s = 1_000.0
        self.before_sleep: Callable[[float | None], None] = lambda _until_s: None

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        found = super().select(0)
        if not found and timeout != 0:
            self.before_sleep(None if timeout is None else self.now_s + timeout)
            assert timeout is not None, "everybody waits, and nothing will ever wake anybody"
            self.now_s += timeout
        return found


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """`before_sleep(until_s)` is called whenever nothing is left to do before `until_s`; None: before nothing at all."""

    def __init__(self) -> None:
        self._jumping = _Jumping()
        super().__init__(self._jumping)

    def time(self) -> float:
        return self._jumping.now_s

    def stand_still(self, for_s: float) -> None:
        """As if nothing had run for so long: the clock goes on, and everything is late."""
        self._jumping.now_s += for_s

    def on_sleep(self, before_sleep: Callable[[float | None], None]) -> None:
        self._jumping.before_sleep = before_sleep


def run_virtually(main: Callable[[VirtualTimeLoop], Coroutine[Any, Any, T]]) -> T:
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        loop = runner.get_loop()
        assert isinstance(loop, VirtualTimeLoop)
        return runner.run(main(loop))
