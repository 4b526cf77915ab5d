"""The event log of a run: every event that a machine heard, with the effects that it caused.

`elastic_ep.replay` feeds them to fresh machines and compares. Other facts (measured stalls, times of death notices) are
notes between them. What is recorded is encoded later, a bit at a time, and a thread of its own writes it (`writer.py`),
so no disk makes the event loop wait.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from elastic_ep.config import EventLogMode
from elastic_ep.event_log.writer import Item, Later, LogWriter
from elastic_ep.machines.machine import Machine


class Note(Protocol):
    """Writes a fact that no machine has heard into the log; `EventLog.note` is one."""

    def __call__(self, kind: str, /, **facts: Any) -> None: ...


def at_once(_seconds: float, call: Callable[[], None]) -> None:
    """A `Later` for where there is no event loop."""
    call()


class EventLog:
    """In `folder`, which is made, for its owner alone; None: nothing is written, and nothing made.

    Raises OSError when the folder cannot be written. A disk that fills up later, or hangs, ends the log, with one line,
    and not the service. `max_bytes` bounds what lies on the disk, 0: nothing does.
    """

    def __init__(
        self,
        folder: Path | None,
        mode: EventLogMode = EventLogMode.IDS,
        *,
        max_bytes: int = 0,
        clock_ns: Callable[[], int] = time.monotonic_ns,
    ) -> None:
        recorded = folder is not None and mode is not EventLogMode.OFF
        self._writer = LogWriter(folder, mode, max_bytes) if folder is not None and recorded else None
        self.private = self._writer is not None and mode is EventLogMode.IDS
        """What is recorded must not tell of any text; where that is in no field marked so, whoever records sees to it."""
        self._later: Later = at_once
        self._clock_ns = clock_ns
        self._machines: Mapping[str, Machine[Any, Any]] = {}
        self._captures = 0

    @property
    def path(self) -> Path | None:
        """Of the file that is being written; None: there is no log."""
        return self._writer.path if self._writer else None

    def begin(
        self,
        run: Mapping[str, Any],
        machines: Mapping[str, Machine[Any, Any]] | None = None,
        later: Later = at_once,
    ) -> None:
        """The first line, of `run`: what replay needs to build the same machines.

        `machines` are asked for their states where a new file begins; without them there is one file without a limit.
        `later` is the event loop's `call_later`: lines are encoded then, and states are read when no machine is between
        an event and its record.
        """
        self._later = later
        self._machines = machines or {}
        if self._writer:
            self._writer.begin(self._clock_ns(), run, later)

    def record(self, machine: str, event: object, effects: Sequence[object], cause: int = 0) -> None:
        """Neither `event` nor `effects` may change afterwards: they are encoded later.

        `cause`: how many records ago the one was of whose effects `event` comes; 0: it came from outside.
        """
        if self._writer:
            self._put(self._writer, (self._clock_ns(), machine, event, effects, cause))

    def note(self, kind: str, /, **facts: Any) -> None:
        if self._writer:
            self._put(self._writer, (self._clock_ns(), "", kind, facts, 0))

    def flush(self) -> None:
        """Return when everything so far is in the file, or never will be. Blocks."""
        if self._writer:
            self._writer.flush()

    def close(self) -> None:
        """Idempotent. Blocks until the log is written, for some seconds at most."""
        if self._writer:
            self._writer.close()

    def _put(self, writer: LogWriter, item: Item) -> None:
        writer.put(item)
        if writer.wanted > self._captures and self._machines:
            self._captures += 1
            self._later(0, self._capture)

    def _capture(self) -> None:
        assert self._writer is not None
        self._writer.put_states(self._clock_ns(), {name: m.state() for name, m in self._machines.items()})
