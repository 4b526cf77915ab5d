"""A loop that stands still is noticed, with what held it; a busy or a stopped machine is not taken for it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any, cast

import pytest
from structlog.testing import capture_logs

from elastic_ep import loop_watch
from elastic_ep.loop_watch import HELD_S, LOOK_S, UNSEEN, Held, HeldReport, make_loop
from tests.kit.bound import Bound
from tests.kit.harness import DEADLINE_S, wait_until
from tests.kit.processes import stop, thread_states

pytestmark = pytest.mark.holds_the_loop("to see it noticed")
LONG_S = 4 * LOOK_S


def holds(work: Callable[[], object], times: int = 1) -> list[Held]:
    """What is noticed of a loop in which `work` runs, so many turns."""
    found: list[Held] = []

    async def main() -> None:
        await asyncio.sleep(2 * LOOK_S)  # the thread has looked
        for _ in range(times):
            work()
            await asyncio.sleep(0.001)

    with asyncio.Runner(loop_factory=lambda: make_loop(found.append)) as runner:
        runner.run(main())
    return found


def seen(work: Callable[[], object]) -> Held:
    """The same of one turn, at which the thread looked: it may get no processor in time itself."""
    for _ in range(20):
        for held in holds(work):
            if held.where != UNSEEN:
                return held
    raise AssertionError("never looked at")


def compute() -> None:
    until = time.thread_time() + LONG_S
    while time.thread_time() < until:
        sum(range(1000))


def sleep() -> None:
    time.sleep(LONG_S)


def call_c() -> None:
    sum(range(30_000_000))  # in one call, which keeps the interpreter lock


@pytest.mark.parametrize("work", [compute, sleep, call_c])
def test_what_holds_the_loop_is_named(work: Callable[[], None]) -> None:
    held = seen(work)
    assert held.seconds > HELD_S
    assert f"({work.__name__})" in held.where
    if work is not call_c:
        assert "interpreter lock" not in held.where


def test_a_call_that_keeps_the_interpreter_lock_is_said_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    never_waited = tmp_path / "schedstat"
    never_waited.write_text("0 0 0")
    monkeypatch.setattr(loop_watch, "SCHEDSTAT", str(never_waited))
    held = seen(call_c)
    assert "interpreter lock" in held.where


def test_a_thread_that_keeps_the_interpreter_lock_holds_the_loop() -> None:
    def meet() -> None:
        thread = threading.Thread(target=call_c)
        thread.start()
        thread.join()

    (held,) = holds(meet)
    assert held.seconds > HELD_S


def test_many_short_turns_are_none() -> None:
    assert not holds(lambda: time.sleep(HELD_S / 10), times=40)


def test_a_frame_of_this_project_comes_before_what_it_calls() -> None:
    places: list[str] = []

    class Foreign(asyncio.SelectorEventLoop):
        def __init__(self, _selector: object) -> None:
            super().__init__()
            places.append(loop_watch.describe(sys._getframe()))

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(asyncio, "SelectorEventLoop", Foreign)
        make_loop(lambda _held: None).close()
    ours, _, foreign = places[0].partition(", in ")
    assert "elastic_ep/loop_watch.py:" in ours
    assert ours.endswith("(make_loop)")
    assert "test_loop_watch.py:" in foreign


BUSY = "while True: pass"
SHORT_TURNS = """
import asyncio, sys, time
from elastic_ep.loop_watch import make_loop
found = []
def work(seconds):
    until = time.thread_time() + seconds
    while time.thread_time() < until:
        sum(range(1000))
async def main():
    print("begun", flush=True)
    for _ in range(int(sys.argv[1])):
        work(float(sys.argv[2]))
        await asyncio.sleep(0.001)
    for held in found:
        print(held)
with asyncio.Runner(loop_factory=lambda: make_loop(found.append)) as runner:
    runner.run(main())
"""


def start(code: str, *arguments: str, **options: Any) -> Bound:
    return Bound([sys.executable, "-c", code, *arguments], **options)


def test_a_loop_that_gets_no_processor_does_not_hold_itself() -> None:
    """Nine processes on one core: each turn takes many times the 50 ms, and 10 ms of processor time."""
    assert on_one_core(8, SHORT_TURNS, "8", "0.01") == "begun\n"


def test_a_wait_for_a_processor_is_not_called_the_interpreter_lock() -> None:
    said = on_one_core(4, SHORT_TURNS, "1", "0.2")
    assert "(work)" in said
    assert "interpreter lock" not in said


def on_one_core(others: int, code: str, *arguments: str) -> str:
    """What it prints, beside others that would like to have the core for themselves."""
    core = min(os.sched_getaffinity(0))
    with ExitStack() as stack:
        for _ in range(others):
            busy = stack.enter_context(start(BUSY))
            stack.callback(busy.kill)
            os.sched_setaffinity(busy.pid, {core})
        loop = stack.enter_context(start(code, *arguments, stdout=subprocess.PIPE))
        stack.callback(loop.kill)
        os.sched_setaffinity(loop.pid, {core})
        printed: str = loop.communicate(timeout=DEADLINE_S * 2)[0]
        return printed


def test_a_process_that_was_stopped_does_not_hold_its_loop() -> None:
    with start(SHORT_TURNS, "200", "0.01", stdout=subprocess.PIPE) as loop:
        assert loop.stdout is not None
        assert loop.stdout.readline() == "begun\n"
        for _ in range(3):
            stop(loop.pid)
            time.sleep(LONG_S)
            os.kill(loop.pid, signal.SIGCONT)
            wait_until(lambda: "T" not in thread_states(loop.pid), DEADLINE_S, "goes on")
        assert loop.communicate(timeout=DEADLINE_S)[0] == ""


def test_it_is_said_once_in_a_while_and_noted_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[tuple[str, dict[str, Any]]] = []
    report = HeldReport(lambda kind, /, **facts: notes.append((kind, facts)))
    with capture_logs() as said:
        report(Held(0.1, 0.0, "first"))
        for _ in range(3):
            report(Held(0.0701, 0.0, "here"))
        monkeypatch.setattr(loop_watch, "SAY_EVERY_S", 0.0)
        report(Held(0.09, 0.0, "there"))
    assert {kind for kind, _ in notes} == {"loop_held"}
    assert [fact for _, fact in notes] == [
        {"ms": 100, "where": "first"},
        *[{"ms": 70, "where": "here"}] * 3,
        {"ms": 90, "where": "there"},
    ]
    assert [(line["held_by"], line["ms"], line.get("times_before")) for line in said] == [
        ("first", 100, None),
        ("there", 90, 3),
    ]


def test_the_thread_ends_with_the_loop() -> None:
    holds(lambda: None)
    assert "eep-loop-watch" not in {thread.name for thread in threading.enumerate()}


def test_without_what_the_kernel_counts_nothing_is_watched(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(loop_watch, "SCHEDSTAT", f"{tmp_path}/{{}}")
    assert holds(compute) == []


def test_a_frame_that_ends_while_it_is_described_is_described_by_what_is_left() -> None:
    class Ending:
        """Its caller is known when it is asked for first, and no more."""

        f_code = SimpleNamespace(co_filename="/elsewhere/library.py", co_qualname="call")
        f_lineno = 1

        def __init__(self) -> None:
            self._callers: list[object] = [SimpleNamespace(f_code=self.f_code, f_lineno=7, f_back=None)]

        @property
        def f_back(self) -> object:
            return self._callers.pop() if self._callers else None

    assert loop_watch.describe(cast(FrameType, Ending())) == "/elsewhere/library.py:1 (call)"
