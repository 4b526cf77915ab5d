"""In which order the watching thread tells of a death."""

from __future__ import annotations

import threading
from typing import Any, cast

import pytest

from elastic_ep.host.death_watch import MUTEX, MUTEX_RELEASED, DeathWatch
from elastic_ep.host.robust_mutex import Locked, RobustMutexes
from tests.kit.harness import DEADLINE_S


class Loop:
    """Performs at once what it is given, on the thread that gives it."""

    def call_soon_threadsafe(self, callback: Any, *arguments: Any) -> None:
        callback(*arguments)


class Mutexes:
    """A mutex that is got in one way, and what is done with it."""

    def __init__(self, how: Locked, story: list[str]) -> None:
        self._how = how
        self._story = story

    def lock(self, slot: int) -> Locked:
        return self._how

    def repair(self, slot: int) -> None:
        self._story.append("repaired")

    def unlock(self, slot: int) -> None:
        self._story.append("unlocked")


STORIES = {
    Locked.OWNER_DIED: [f"died: {MUTEX}", "peers told", "repaired", "unlocked", "released"],
    Locked.FREE: [f"died: {MUTEX_RELEASED}", "unlocked", "released"],
    Locked.UNRECOVERABLE: [f"died: {MUTEX}", "released"],
}


@pytest.mark.parametrize(("how", "expected"), STORIES.items(), ids=lambda value: str(value)[:20])
def test_the_controller_knows_the_cause_before_peers_do_without_the_rank(
    how: Locked, expected: list[str]
) -> None:
    """Else a survivor's step that did without it might be the first that the controller hears of the death."""
    story: list[str] = []
    over = threading.Event()
    watch = DeathWatch(cast(RobustMutexes, Mutexes(how, story)), cast(Any, Loop()))

    def released() -> None:
        assert watch.busy_slots == set(), "the slot may be used again"
        story.append("released")
        over.set()

    watch.watch(
        3, lambda cause, _at_ns: story.append(f"died: {cause}"), released, lambda: story.append("peers told")
    )
    assert over.wait(DEADLINE_S)
    assert story == expected


def test_when_the_loop_is_closed_peers_are_told_all_the_same() -> None:
    class Closed:
        def call_soon_threadsafe(self, callback: Any, *arguments: Any) -> None:
            raise RuntimeError("Event loop is closed")

    told = threading.Event()
    watch = DeathWatch(cast(RobustMutexes, Mutexes(Locked.OWNER_DIED, [])), cast(Any, Closed()))
    watch.watch(0, lambda _cause, _at_ns: None, lambda: None, told.set)
    assert told.wait(DEADLINE_S)
