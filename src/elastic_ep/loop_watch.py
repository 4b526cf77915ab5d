"""Notices when an event loop stands still, and says what held it.

The loop's selector is where it waits: from the end of one wait to the beginning of the next is a *turn*, in which
nothing else of the loop runs. A turn costs two looks at the clock. A thread looks a few times a second where the loop
is; what it saw last in a turn that proves too long is what is named.

A busy machine is nobody's fault: the time in which the loop's thread could run and got no processor does not count.
"""

from __future__ import annotations

import asyncio
import os
import selectors
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import structlog

from elastic_ep.event_log.log import Note

log = structlog.get_logger()
HELD_S = 0.05
"""A turn of the loop may take so long."""
LOOK_S = 0.05
"""Between two looks of the thread."""
STOP_S = 1.0
"""At most so long a loop that is closed waits for it."""
SAY_EVERY_S = 10.0
SCHEDSTAT = "/proc/self/task/{}/schedstat"
"""Of a thread, nanoseconds: processor time, time in which it could run and had no processor."""
UNSEEN = "something that was over before anybody looked"
_YOUNG_S = 0.01
"""A turn that has taken so much longer may become a long one: the thread notes where it is."""
_LATE_S = 0.025
"""A look that comes so much later than it should was kept from the interpreter, or the whole process was stopped."""
_PACKAGE = str(Path(__file__).parent.parent)
_SOURCES = str(Path(__file__).parent.parent.parent)


@dataclass(frozen=True, slots=True)
class Held:
    """The loop stood still for so long, beside what its thread waited for a processor, in a turn that began at
    `began_s` (time.monotonic). `where` is one line.
    """

    seconds: float
    began_s: float
    where: str


@dataclass(frozen=True, slots=True)
class _Look:
    """What had passed by a moment, nanoseconds: on the clock, in the loop's thread's waits for a processor, and of
    processor time in the whole process."""

    at: int
    waited: int
    worked: int


@dataclass(frozen=True, slots=True)
class _Sight:
    """Where the loop's thread was in a turn; whether the look came late, this one or one before in the turn."""

    turn: int
    where: str
    late: bool


class WatchedSelector(selectors.DefaultSelector):
    """For one event loop: ``asyncio.SelectorEventLoop(WatchedSelector(on_held))``. `on_held` is called on its thread.

    `on_held` must not raise. The thread lives from the loop's first turn to `close`. Where the kernel does not tell
    how long a thread has waited for a processor (`SCHEDSTAT`) nothing is watched.
    """

    def __init__(self, on_held: Callable[[Held], None]) -> None:
        super().__init__()
        self._on_held = on_held
        self._turn = 0
        self._began = 0
        """When the present turn did, nanoseconds; 0 while the loop waits."""
        self._thread: _Watcher | None = None

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        began, self._began = self._began, 0
        if began and time.monotonic_ns() - began > HELD_S * 1e9:
            self._judge(began)
        ready = super().select(timeout)
        self._turn += 1
        self._began = time.monotonic_ns()
        if self._thread is None and asyncio._get_running_loop() is not None:
            self._thread = _Watcher(self)
        return ready

    def close(self) -> None:
        if self._thread is not None:
            self._thread.stop()
        super().close()

    @property
    def present(self) -> tuple[int, int]:
        """(number of the turn, when it began or 0)."""
        return self._turn, self._began

    def _judge(self, began: int) -> None:
        if self._thread is not None and (held := self._thread.judge(self._turn, began)) is not None:
            self._on_held(held)


class _Watcher:
    """The thread, and the judgement on what it saw. Made on the loop's thread."""

    def __init__(self, selector: WatchedSelector) -> None:
        self._selector = selector
        self._loop_thread = threading.get_ident()
        self._stopped = threading.Event()
        self._sight: _Sight | None = None
        self._thread = threading.Thread(target=self._run, name="eep-loop-watch", daemon=True)
        try:
            self._stat = os.open(SCHEDSTAT.format(threading.get_native_id()), os.O_RDONLY)
        except OSError:
            self._stat = -1
            return
        self._look = self._look_now()
        """The newest one that was not in the middle of a turn that has taken long already."""
        self._thread.start()

    def stop(self) -> None:
        """The thread has ended then, and its descriptor is closed."""
        self._stopped.set()
        if self._stat >= 0:
            self._thread.join(STOP_S)

    def judge(self, turn: int, began: int) -> Held | None:
        """Whether that turn, which ends now, held the loop."""
        if self._stat < 0:
            return None
        # What it sees from here on is this.
        sight = self._sight if self._sight is not None and self._sight.turn == turn else None
        look, now = self._look, self._look_now()
        ran = now.at - max(began, look.at) - (now.waited - look.waited)
        if sight is None or sight.late:
            # The thread could not look either: a call kept the interpreter lock, which takes a processor; or else
            # the process was stopped, or a thread that had the lock got no processor.
            ran = min(ran, now.worked - look.worked)
        if ran <= HELD_S * 1e9:
            return None
        where = sight.where if sight else UNSEEN
        return Held(ran / 1e9, began / 1e9, where)

    def _look_now(self) -> _Look:
        return _Look(time.monotonic_ns(), _waited(self._stat), time.process_time_ns())

    def _run(self) -> None:
        own = os.open(SCHEDSTAT.format(threading.get_native_id()), os.O_RDONLY)
        with suppress(OSError):  # the loop's thread has ended
            self._look_on(own)
        self._stopped.wait()
        os.close(own)
        os.close(self._stat)

    def _look_on(self, own: int) -> None:
        last, waits = time.monotonic_ns(), _waited(own) + _waited(self._stat)
        while not self._stopped.wait(LOOK_S):
            turn, began = self._selector.present
            now, waits_now = time.monotonic_ns(), _waited(own) + _waited(self._stat)
            overdue = now - last - LOOK_S * 1e9
            # Its own wait for a processor, or that of a loop that had the lock meanwhile, is no call's doing.
            kept = overdue - (waits_now - waits)
            last, waits = now, waits_now
            if not began or now - began < _YOUNG_S * 1e9:
                self._look_between()
            elif frame := sys._current_frames().get(self._loop_thread):
                self._note(turn, describe(frame), overdue > _LATE_S * 1e9, kept > _LATE_S * 1e9)

    def _look_between(self) -> None:
        """HAZARD: between any two lines the interpreter lock may be gone for as long as a call keeps it. A look from
        behind that call would hide it, so whether the turn was young is asked after the look.
        """
        look = self._look_now()
        _, began = self._selector.present
        if not began or look.at - began < _YOUNG_S * 1e9:
            self._look = look

    def _note(self, turn: int, where: str, late: bool, locked: bool) -> None:
        before = self._sight
        was_late = before is not None and before.turn == turn and before.late
        if locked:
            where = f"a call that kept the interpreter lock and returned in {where}"
        self._sight = _Sight(turn, where, late or was_late)


class HeldReport:
    """What to do about it: a line for the operator, at most one in `SAY_EVERY_S`; each time a note in the event log."""

    def __init__(self, note: Note) -> None:
        self._note = note
        self._said = -SAY_EVERY_S
        self._unsaid = 0

    def __call__(self, held: Held) -> None:
        milliseconds = round(held.seconds * 1000)
        self._note("loop_held", ms=milliseconds, where=held.where)
        if time.monotonic() - self._said < SAY_EVERY_S:
            self._unsaid += 1
            return
        more = {"times_before": self._unsaid} if self._unsaid else {}
        log.warning("the event loop stood still", ms=milliseconds, held_by=held.where, **more)
        self._said, self._unsaid = time.monotonic(), 0


def make_loop(on_held: Callable[[Held], None]) -> asyncio.AbstractEventLoop:
    """A new event loop that is watched."""
    return asyncio.SelectorEventLoop(WatchedSelector(on_held))


def _waited(stat: int) -> int:
    """How long the thread has waited for a processor, nanoseconds. Raises OSError when it has ended."""
    return int(os.pread(stat, 64, 0).split()[1])


def describe(frame: FrameType) -> str:
    """The innermost frame of this project, and the innermost of all where that is another.

    HAZARD: another thread may run it meanwhile. One that has ended has no `f_back` any more, though it just had one.
    """
    innermost, ours = frame, frame
    while not ours.f_code.co_filename.startswith(_PACKAGE) and (outer := ours.f_back) is not None:
        ours = outer
    if not ours.f_code.co_filename.startswith(_PACKAGE):
        ours = innermost
    shown = _place(ours)
    return shown if ours is innermost else f"{shown}, in {_place(innermost)}"


def _place(frame: FrameType) -> str:
    file = frame.f_code.co_filename
    for root in (_SOURCES, *sys.path):
        if root and file.startswith(root + os.sep):
            file = file[len(root) + 1 :]
            break
    return f"{file}:{frame.f_lineno} ({frame.f_code.co_qualname})"
