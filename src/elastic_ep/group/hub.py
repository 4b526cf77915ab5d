"""Feeds the run process's machines: one queue, one clock, one record of all that they hear and say, one timer.

A machine's shell performs its effects, and posts what comes of them: an event's cause is the event in whose effects it
was posted. The queue is why no shell is ever called within another one (dask's worker does the same with its
instructions), and why the log shows a cause before what other machines make of it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import structlog

from elastic_ep.machines.contract import Tick, UnexpectedEvent

LEAST_WAIT_S = 0.001
log = structlog.get_logger()


class Shell(Protocol):
    """Performs one machine's effects, each in one of the two calls. Must not raise; may post."""

    def at_once(self, effects: Sequence[Any]) -> None:
        """Those that somebody waits for: before anything is logged."""

    def perform(self, event: Any, effects: Sequence[Any]) -> None:
        """The rest. `event` is what they are effects of."""


class Record(Protocol):
    def __call__(self, machine: str, event: object, effects: Sequence[object], cause: int = 0) -> None:
        """`cause`: how many events ago the one came that this is a consequence of; 0: it came from outside."""


class _Fed(NamedTuple):
    machine: Any
    shell: Shell
    clocked: bool
    deadline_ms: Callable[[], int | None]


class Hub:
    """Event loop only. `now_ms` is the clock that all machines go by."""

    def __init__(self, record: Record, now_ms: Callable[[], int]) -> None:
        self.now_ms = now_ms
        self._record = record
        self._fed: dict[str, _Fed] = {}
        self._queue: deque[tuple[str, Any, int]] = deque()
        self._number = 0
        """Of the newest event."""
        self._performing = 0
        """The event whose effects are being performed; 0: none."""
        self._busy = False
        self._stepped: set[str] = set()
        """Machines whose deadline may be another than in `_due_ms`."""
        self._due_ms: dict[str, int] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._rings_ms: int | None = None

    def attach(self, name: str, machine: Any, shell: Shell, *, clocked: bool = True) -> None:
        """`clocked`: whatever the machine hears, it hears first what time it is; else only when a deadline is over."""
        if name in self._fed:
            raise ValueError(f"{name} has a shell")
        self._fed[name] = _Fed(machine, shell, clocked, getattr(machine, "next_deadline_ms", _never))

    def post(self, name: str, event: Any) -> None:
        """Feed the machine, now, or when what is in hand has been performed.

        Raises `UnexpectedEvent`, with nothing changed, if the machine takes no such event now. What comes of `event`
        raises nothing: consequences that a machine refuses, or that a shell cannot perform, are a fault of this program,
        and are logged.
        """
        self._queue.append((name, event, self._performing))
        if self._busy:
            return
        self._busy = True
        try:
            self._feed(*self._queue.popleft())
        finally:
            self._take_the_rest()
            self._busy = False
            self._set_timer()

    def _take_the_rest(self) -> None:
        while self._queue:
            name, event, cause = self._queue.popleft()
            try:
                self._feed(name, event, cause)
            except UnexpectedEvent:
                log.exception("a machine refused what another one's effect led to", machine=name)
            except Exception:  # HAZARD: else the hub stays busy, and nothing is heard any more
                log.exception("an effect could not be performed", machine=name)

    def _feed(self, name: str, event: Any, cause: int) -> None:
        fed = self._fed[name]
        if fed.clocked and not isinstance(event, Tick):
            now = Tick(self.now_ms())
            if now.now_ms > fed.machine.now_ms:
                self._step(name, fed, now, 0)
        self._step(name, fed, event, cause)

    def _step(self, name: str, fed: _Fed, event: Any, cause: int) -> None:
        effects = fed.machine.step(event)
        self._stepped.add(name)
        self._number += 1
        self._performing = self._number
        try:
            fed.shell.at_once(effects)
            self._record(name, event, effects, self._number - cause if cause else 0)
            fed.shell.perform(event, effects)
        finally:
            self._performing = 0

    def _set_timer(self) -> None:
        for name in self._stepped:
            due_ms = self._fed[name].deadline_ms()
            if due_ms is None:
                self._due_ms.pop(name, None)
            else:
                self._due_ms[name] = due_ms
        self._stepped.clear()
        rings_ms = min(self._due_ms.values(), default=None)
        if rings_ms == self._rings_ms:
            return
        self._rings_ms = rings_ms
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if rings_ms is not None:
            delay_s = max(LEAST_WAIT_S, (rings_ms - self.now_ms()) / 1000)
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = self._rings_ms = None
        now = Tick(self.now_ms())
        for name, due_ms in list(self._due_ms.items()):
            if due_ms <= now.now_ms:
                self.post(name, now)
        self._set_timer()


def _never() -> None:
    return None
