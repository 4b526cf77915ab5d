"""Hosts that wait for each other at the beginning of a step."""

from __future__ import annotations

import threading
from collections.abc import Collection
from pathlib import Path

from elastic_ep.exchange.base import Work
from elastic_ep.exchange.step_barrier import NOT_BEGUN, StepBarrier

DEADLINE_S = 20.0


class Waiting(threading.Thread):
    """Waits for `ranks` to begin `step`; they may be changed meanwhile. `looked` is set after every look."""

    def __init__(self, barrier: StepBarrier, step: int, ranks: Collection[int]) -> None:
        super().__init__(daemon=True)
        self._words, self._step = barrier, step
        self.ranks = ranks
        self.looked = threading.Semaphore(0)
        self.start()

    def run(self) -> None:
        self._words.wait_for(self._step, self._look)

    def _look(self) -> Collection[int]:
        self.looked.release()
        return self.ranks

    def still_waits(self) -> bool:
        """It has looked at all that was there before this call."""
        return all(self.looked.acquire(timeout=DEADLINE_S) for _ in range(300)) and self.is_alive()

    def ends(self) -> bool:
        self.join(DEADLINE_S)
        return not self.is_alive()


def barrier(directory: Path, rank: int) -> StepBarrier:
    return StepBarrier(directory, 3, rank)


def test_a_step_begins_when_all_have_come_to_it(tmp_path: Path) -> None:
    mine, second, third = (barrier(tmp_path, rank) for rank in range(3))
    for each in (mine, second, third):
        each.say(6)
    mine.say(7)
    waiting = Waiting(mine, 7, {0, 1, 2})
    second.say(7)
    assert waiting.still_waits()
    third.say(8)  # it has seen this rank come, and is past the step already
    assert waiting.ends()


def test_who_is_masked_is_not_waited_for(tmp_path: Path) -> None:
    mine = barrier(tmp_path, 0)
    mine.say(7)
    waiting = Waiting(mine, 7, {0, 2})
    assert waiting.still_waits()
    waiting.ranks = {0}
    assert waiting.ends()


def test_what_each_computes_is_known_until_it_begins_the_second_step_after(tmp_path: Path) -> None:
    mine, other = barrier(tmp_path, 0), barrier(tmp_path, 1)
    for step in range(5):
        other.say_work(step, Work(10 * step, step))
        assert mine.work_of(1, step) == Work(10 * step, step)
        assert step == 0 or mine.work_of(1, step - 1) == Work(10 * step - 10, step - 1)
    assert mine.work_of(0, 4) == mine.work_of(2, 4) == Work(0, 0)
    assert mine.of(1) == NOT_BEGUN
    barrier(tmp_path, 1)
    assert mine.work_of(1, 3) == mine.work_of(1, 4) == Work(0, 0)


def test_words_are_seen_by_all_and_a_new_incarnation_has_begun_nothing(tmp_path: Path) -> None:
    all_words = [barrier(tmp_path, rank) for rank in range(3)]
    all_words[1].say(12)
    assert [all_words[0].of(rank) for rank in range(3)] == [NOT_BEGUN, 12, NOT_BEGUN]
    barrier(tmp_path, 1)
    assert all_words[2].of(1) == NOT_BEGUN
