"""What the kernel says of a rank's threads comes out as the time that they waited for a processor, and not twice."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_ep.host.starvation import Starvation
from elastic_ep.machines.membership.progress import Starved
from elastic_ep.wire.messages import Member
from tests.kit.bound import Bound
from tests.kit.processes import stop

MEMBER = Member(3, 1)
PID = 4711
MS = 1_000_000


class FakeThread:
    """A thread as /proc shows it: the kernel adds to the time waited only when the wait ends with the processor."""

    def __init__(self, proc: Path, tid: int) -> None:
        self.folder = proc / str(PID) / "task" / str(tid)
        self.folder.mkdir(parents=True)
        self.ran_ms = self.waited_ms = self.unpaid_ms = 0
        self.unseen_ms = 0
        """Of a wait under way, what came before a look has found the thread ready."""
        self.show("S")

    def live(self, what: str, for_ms: int) -> None:
        """`what` it does: "run", "wait" (ready, without a processor), "sleep" or "stop"."""
        if what == "wait":
            self.unseen_ms = self.unseen_ms or for_ms
            self.unpaid_ms += for_ms
        else:
            self.unseen_ms = 0
            self.waited_ms, self.unpaid_ms = self.waited_ms + self.unpaid_ms, 0
            self.ran_ms += for_ms if what == "run" else 0
        self.show({"run": "R", "wait": "R", "sleep": "S", "stop": "T"}[what])

    def show(self, state: str) -> None:
        (self.folder / "schedstat").write_text(f"{self.ran_ms * MS} {self.waited_ms * MS} 7\n")
        (self.folder / "stat").write_text(f"{PID} (a name) of) thread) {state} 1 2 3\n")


LIVES = st.lists(
    st.tuples(st.sampled_from(["run", "wait", "sleep", "stop"]), st.integers(1, 300)), min_size=1, max_size=20
)


@settings(max_examples=40, deadline=None)
@given(lives=st.lists(LIVES, min_size=1, max_size=3))
def test_all_that_threads_waited_is_told_once(lives: list[Any]) -> None:
    with TemporaryDirectory() as folder:
        threads = [FakeThread(Path(folder), 100 + number) for number in range(len(lives))]
        starvation = Starvation(Path(folder))
        for thread in threads:
            thread.live("run", 1)
        now_ms = told_ms = 0
        starvation.sample({MEMBER: PID}, now_ms)
        for step in range(max(map(len, lives))):
            present = [life[step] if step < len(life) else ("sleep", 0) for life in lives]
            length = max(1, max(ms for _, ms in present))
            for thread, (what, _) in zip(threads, present, strict=True):
                thread.live(what, length)
            now_ms += length
            told_ms += sum(each.ms for each in starvation.sample({MEMBER: PID}, now_ms * MS))
            waited_ms = sum(thread.waited_ms for thread in threads)
            unpaid_ms = sum(thread.unpaid_ms for thread in threads)
            unseen_ms = sum(thread.unseen_ms for thread in threads)
            assert waited_ms + unpaid_ms - unseen_ms <= told_ms <= waited_ms + unpaid_ms


def test_what_is_not_there_or_not_readable_is_not_starved(tmp_path: Path) -> None:
    starvation = Starvation(tmp_path)
    thread = FakeThread(tmp_path, 100)
    for _ in range(2):
        assert starvation.sample({MEMBER: PID, Member(0, 1): 99}) == ()
    (thread.folder / "schedstat").write_text("not kept here")
    assert starvation.sample({MEMBER: PID}) == ()
    (thread.folder / "schedstat").unlink()
    assert starvation.sample({MEMBER: PID}) == ()
    assert starvation.sample({}) == ()


SPIN = """
import os, sys
os.sched_setaffinity(0, {int(sys.argv[1])})
while True:
    pass
"""


@pytest.fixture
def spinning() -> Iterator[list[Bound]]:
    """Two processes that would like to have one processor each, and share one."""
    processor = str(min(os.sched_getaffinity(0)))
    processes = [Bound([sys.executable, "-c", SPIN, processor]) for _ in range(2)]
    yield processes
    for process in processes:
        process.kill()
        process.wait()


@pytest.mark.timeout(60)
def test_the_kernel_tells_a_process_that_shares_its_processor_from_one_that_is_stopped(
    spinning: list[Bound],
) -> None:
    starvation, pids = Starvation(), {MEMBER: spinning[0].pid}
    limit = time.monotonic() + 30
    found: tuple[Starved, ...] = ()
    while not any(one.ms for one in found):  # at first they start, one after the other
        assert time.monotonic() < limit
        time.sleep(0.05)
        found = starvation.sample(pids)
    assert [one.member for one in found] == [MEMBER]
    stop(spinning[0].pid)
    starvation.sample(pids)
    for _ in range(5):
        time.sleep(0.02)
        assert starvation.sample(pids) == ()
