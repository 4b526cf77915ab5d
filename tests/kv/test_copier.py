"""What the copier is asked for is done or told to be over: fetches first, and nobody waits for a copy."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue

import numpy as np
import pytest

from elastic_ep.kv import copier as module
from elastic_ep.kv.copier import Bytes, PageCopier
from elastic_ep.kv.names import PageName
from elastic_ep.kv.shelf import Shelf
from elastic_ep.kv.shelf_file import ShelfLayout
from tests.kit.harness import wait_until
from tests.kit.shelf import content, name_of, page, shelf_file

LAYOUT = ShelfLayout(regions=2, slots=40, page_bytes=48)
DEADLINE_S = 60.0


class Mover:
    """A device whose pages are rows of an array. Where it is held, a call says so and waits until it is let go."""

    page_bytes = LAYOUT.page_bytes
    most = 3

    def __init__(self) -> None:
        self.cache: Bytes = np.zeros((100, self.page_bytes), np.uint8)
        self.calls: list[tuple[str, list[int]]] = []
        self.fails: Callable[[str, Sequence[int]], bool] = lambda what, pages: False
        self.held = threading.Event()
        self.inside = False
        self.arrived: SimpleQueue[str] = SimpleQueue()
        self.let_go: SimpleQueue[None] = SimpleQueue()
        self._staging: Bytes = np.zeros((self.most, self.page_bytes), np.uint8)

    def _call(self, what: str, pages: Sequence[int]) -> None:
        self.calls.append((what, list(pages)))
        if self.held.is_set():
            self.inside = True
            self.arrived.put(what)
            try:
                self.let_go.get(timeout=DEADLINE_S)
            finally:
                self.inside = False
        if self.fails(what, pages):
            raise RuntimeError("the device has failed")

    def read(self, pages: Sequence[int]) -> Bytes:
        self._call("read", pages)
        self._staging[: len(pages)] = self.cache[list(pages)]
        return self._staging[: len(pages)]

    def staging(self, n: int) -> Bytes:
        return self._staging[:n]

    def write(self, pages: Sequence[int], data: Bytes) -> None:
        self._call("write", pages)
        self.cache[list(pages)] = data

    def hold(self) -> None:
        self.held.set()

    def wait_for_call(self) -> str:
        return self.arrived.get(timeout=DEADLINE_S)

    def release(self) -> None:
        self.held.clear()
        self.let_go.put(None)

    def fill(self, numbers: Sequence[int]) -> list[tuple[PageName, int]]:
        """Page n has what the name of n says."""
        for number in numbers:
            self.cache[number] = page(name_of(number), self.page_bytes)
        return [(name_of(number), number) for number in numbers]


class Over:
    """What the copier has told to be over."""

    def __init__(self, copier: PageCopier) -> None:
        self.stored: list[int] = []
        self.fetched: list[tuple[int, int]] = []
        self._copier = copier

    def take(self) -> Over:
        done = self._copier.take_done()
        self.stored += done.stored
        self.fetched += done.fetched
        return self

    def wait(self, stored: int = 0, fetched: int = 0) -> Over:
        def over() -> bool:
            self.take()
            return len(self.stored) >= stored and len(self.fetched) >= fetched

        wait_until(over, DEADLINE_S, f"{stored} pages are stored, {fetched} fetches over")
        return self


@pytest.fixture
def fd() -> Iterator[int]:
    with shelf_file(LAYOUT) as fd:
        yield fd


class End:
    """A rank's."""

    def __init__(self, fd: int, region: int) -> None:
        self.mover = Mover()
        self.shelf = Shelf(fd, LAYOUT, region)
        self.copier = PageCopier(self.shelf, self.mover)
        self.over = Over(self.copier)


@pytest.fixture
def ends(fd: int) -> Iterator[tuple[End, End]]:
    one, other = End(fd, 0), End(fd, 1)
    yield one, other
    for end in (one, other):
        end.copier.close()


def names(numbers: Sequence[int]) -> list[PageName]:
    return [name_of(number) for number in numbers]


def has(mover: Mover, cached: Sequence[int], numbers: Sequence[int]) -> bool:
    return all(
        mover.cache[at].tobytes() == content(name_of(number), LAYOUT.page_bytes)
        for at, number in zip(cached, numbers, strict=True)
    )


def test_what_one_rank_stores_another_fetches(ends: tuple[End, End]) -> None:
    one, other = ends
    numbers = list(range(1, 9))
    one.copier.store(one.mover.fill(numbers))
    assert one.over.wait(stored=8).stored == numbers
    assert all(other.copier.on_shelf(name) for name in names(numbers))
    assert not other.copier.on_shelf(name_of(9))
    cached = list(range(50, 58))
    other.copier.fetch(7, names(numbers), cached)
    assert other.over.wait(fetched=1).fetched == [(7, 8)]
    assert has(other.mover, cached, numbers)
    assert (one.copier.counts.stored, other.copier.counts.fetched) == (8, 8)


def test_a_fetch_goes_before_stores_that_wait(ends: tuple[End, End]) -> None:
    one, other = ends
    other.copier.store(other.mover.fill([20, 21]))
    other.over.wait(stored=2)
    one.mover.hold()
    one.copier.store(one.mover.fill([1]))
    one.mover.wait_for_call()
    one.copier.store(one.mover.fill([2, 3, 4, 5]))
    one.copier.fetch(1, names([20, 21]), [50, 51])
    one.mover.release()
    one.over.wait(stored=5, fetched=1)
    assert one.mover.calls == [("read", [1]), ("write", [50, 51]), ("read", [2, 3, 4]), ("read", [5])]


def test_pages_that_are_on_the_shelf_are_not_stored_again(ends: tuple[End, End]) -> None:
    one, other = ends
    other.copier.store(other.mover.fill([2]))
    other.over.wait(stored=1)
    one.copier.store(one.mover.fill([1, 2, 3]))
    assert one.over.wait(stored=3).stored == [1, 2, 3]
    assert one.mover.calls == [("read", [1, 3])]


def test_when_stores_come_too_fast_the_oldest_that_wait_are_let_go(
    fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MOST_WAITING_BYTES", 5 * LAYOUT.page_bytes)
    end = End(fd, 0)
    end.mover.hold()
    end.copier.store(end.mover.fill([1]))
    end.mover.wait_for_call()
    for first in (2, 5, 8):
        end.copier.store(end.mover.fill(range(first, first + 3)))
    assert end.over.take().stored == [2, 3, 4, 5], "at once, and not when the copier comes to it"
    end.mover.release()
    assert end.over.wait(stored=10).stored == [2, 3, 4, 5, 1, 6, 7, 8, 9, 10]
    assert [number for number in range(1, 11) if end.copier.on_shelf(name_of(number))] == [1, 6, 7, 8, 9, 10]
    assert end.copier.counts.dropped == 4
    end.copier.close()


def test_a_store_that_fails_is_over_and_the_next_one_is_made(ends: tuple[End, End]) -> None:
    one, _ = ends
    one.mover.fails = lambda what, pages: 2 in pages
    one.copier.store(one.mover.fill(range(1, 7)))
    assert one.over.wait(stored=6).stored == [1, 2, 3, 4, 5, 6]
    assert [one.copier.on_shelf(name) for name in names(range(1, 7))] == [False] * 3 + [True] * 3


@pytest.mark.parametrize(("bad", "good"), [(50, 0), (54, 3)])
def test_a_fetch_that_fails_is_over_and_tells_how_far_it_came(
    ends: tuple[End, End], bad: int, good: int
) -> None:
    one, _ = ends
    numbers = [1, 2, 3, 4, 5]
    one.copier.store(one.mover.fill(numbers))
    one.over.wait(stored=5)
    one.mover.fails = lambda what, pages: what == "write" and bad in pages
    one.copier.fetch(1, names(numbers), range(50, 55))
    one.copier.fetch(2, names(numbers), range(60, 65))
    assert one.over.wait(fetched=2).fetched == [(1, good), (2, 5)]
    assert has(one.mover, range(50, 50 + good), numbers[:good])
    assert has(one.mover, range(60, 65), numbers)


@pytest.mark.parametrize("wrong", [1, 3, 5])
def test_of_a_fetch_the_pages_before_one_that_is_missing_or_bad_are_had(
    ends: tuple[End, End], fd: int, wrong: int
) -> None:
    one, other = ends
    numbers = [1, 2, 3, 4, 5]
    one.copier.store(one.mover.fill(numbers))
    one.over.wait(stored=5)
    os.pwrite(fd, b"other", LAYOUT.page_at(0, numbers.index(wrong)))
    for ticket in range(2):
        other.copier.fetch(ticket, names(numbers), range(50, 55))
    assert other.over.wait(fetched=2).fetched == [(0, wrong - 1), (1, wrong - 1)]
    assert has(other.mover, range(50, 49 + wrong), numbers[: wrong - 1])
    assert not other.mover.cache[49 + wrong :].any(), "nothing is written that is not right"
    assert other.copier.counts.bad == 1


def test_what_closes_begins_nothing_more(fd: int) -> None:
    end = End(fd, 0)
    end.mover.hold()
    end.copier.store(end.mover.fill(range(1, 8)))
    end.mover.wait_for_call()
    end.copier.fetch(1, names([1]), [50])
    closing = threading.Thread(target=end.copier.close)
    closing.start()
    wait_until(lambda: end.copier.closing, DEADLINE_S, "it has heard")
    end.mover.release()
    closing.join(DEADLINE_S)
    assert not closing.is_alive()
    assert end.mover.calls == [("read", [1, 2, 3])]
    assert sorted(end.over.take().stored) == list(range(1, 8)), "nobody holds a page for it any longer"
    assert end.over.fetched == [(1, 0)]
    end.copier.store(end.mover.fill([20]))
    end.copier.fetch(2, names([1]), [50])
    assert (end.over.take().stored[-1], end.over.fetched[-1]) == (20, (2, 0))


def test_a_device_that_does_not_answer_keeps_nobody_from_closing(
    fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "CLOSE_S", 0.01)
    end = End(fd, 0)
    end.mover.hold()
    end.copier.store(end.mover.fill([1]))
    end.mover.wait_for_call()
    end.copier.close()
    assert end.mover.inside
    end.mover.release()


def test_many_stores_and_fetches_at_once_are_each_over_once(ends: tuple[End, End]) -> None:
    one, other = ends
    waiting = deque(range(1, 40))
    tickets = 0
    while waiting:
        some = [waiting.popleft() for _ in range(min(4, len(waiting)))]
        one.copier.store(one.mover.fill(some))
        other.copier.fetch(tickets, names(some), [number + 40 for number in some])
        tickets += 1
    one.over.wait(stored=39)
    other.over.wait(fetched=tickets)
    assert sorted(one.over.stored) == list(range(1, 40))
    assert [ticket for ticket, _ in other.over.fetched] == list(range(tickets))
    for ticket, good in other.over.fetched:
        some = list(range(1 + 4 * ticket, 1 + 4 * ticket + good))
        assert has(other.mover, [number + 40 for number in some], some)
