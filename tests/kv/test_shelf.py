"""What is put on the shelf is there until its region is full, whoever dies; what is got is the page of that name."""

from __future__ import annotations

import os
import struct
import sys
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from elastic_ep.kv import shelf as module
from elastic_ep.kv.names import PageName
from elastic_ep.kv.shelf import Shelf
from elastic_ep.kv.shelf_file import HEADER_BYTES, ShelfLayout
from tests.kit.shelf import content, got, name_of, page, put, shelf_file

SMALL = ShelfLayout(regions=2, slots=4, page_bytes=48)
ALIKE = [name_of(0)[:12] + last.to_bytes(4, "little") for last in range(3)]
"""Names with the same bits in the index."""


@pytest.fixture
def fd() -> Iterator[int]:
    with shelf_file(SMALL) as fd:
        yield fd


class Region:
    """What a region should have: names, the least recently used first, and whether other ranks have used them since."""

    def __init__(self) -> None:
        self.pages: OrderedDict[PageName, bool] = OrderedDict()

    def use(self, name: PageName, by_owner: bool) -> None:
        if by_owner:
            self.pages[name] = False
            self.pages.move_to_end(name)
        else:
            self.pages[name] = True

    def put(self, name: PageName, most: int) -> None:
        if name not in self.pages and len(self.pages) == most:
            while True:
                oldest, used = self.pages.popitem(last=False)
                if not used:
                    break
                self.pages[oldest] = False
        self.pages.setdefault(name, False)
        self.pages.move_to_end(name)


class ShelfAsADict(RuleBasedStateMachine):
    """Each name is one region's alone, so that it is known whose page a reader has used."""

    def __init__(self) -> None:
        super().__init__()
        self.fd = -1

    @initialize(regions=st.integers(1, 3), slots=st.sampled_from([1, 2, 3, 5, 70]))
    def open(self, regions: int, slots: int) -> None:
        self.layout = ShelfLayout(regions, slots, 40)
        self.fd = self.layout.create()
        self.shelves = [Shelf(self.fd, self.layout, region) for region in range(regions)]
        self.regions = [Region() for _ in range(regions)]
        self.names = [name_of(number) for number in range(regions * (slots + 3))]

    def owner(self, name: PageName) -> int:
        return self.names.index(name) % self.layout.regions

    @rule(numbers=st.lists(st.integers(0, 200), max_size=8))
    def puts(self, numbers: list[int]) -> None:
        for number in numbers:
            name = self.names[number % len(self.names)]
            assert put(self.shelves[self.owner(name)], name)
            self.regions[self.owner(name)].put(name, self.layout.slots)

    @rule(number=st.integers(0, 200), reader=st.integers(0, 2))
    def gets(self, number: int, reader: int) -> None:
        name, reader = self.names[number % len(self.names)], reader % self.layout.regions
        owner = self.owner(name)
        there = name in self.regions[owner].pages
        assert got(self.shelves[reader], name) == there
        if there:
            self.regions[owner].use(name, reader == owner)

    @rule(numbers=st.lists(st.integers(0, 200), max_size=6, unique=True), reader=st.integers(0, 2))
    def asks_what_is_missing(self, numbers: list[int], reader: int) -> None:
        reader %= self.layout.regions
        names = list(dict.fromkeys(self.names[number % len(self.names)] for number in numbers))
        missing = self.shelves[reader].missing(names)
        there = [self.regions[self.owner(name)].pages.keys() >= {name} for name in names]
        assert missing == [place for place, is_there in enumerate(there) if not is_there]
        for name, is_there in zip(names, there, strict=True):
            if is_there:
                self.regions[self.owner(name)].use(name, self.owner(name) == reader)

    @rule(region=st.integers(0, 2))
    def a_rank_dies_and_comes_back(self, region: int) -> None:
        region %= self.layout.regions
        self.shelves[region] = Shelf(self.fd, self.layout, region)

    @rule(numbers=st.lists(st.integers(0, 200), max_size=10), reader=st.integers(0, 2))
    def finds(self, numbers: list[int], reader: int) -> None:
        names = [self.names[number % len(self.names)] for number in numbers]
        there = [name in self.regions[self.owner(name)].pages for name in names]
        leading = [*there, False].index(False)
        assert self.shelves[reader % self.layout.regions].find(names) == leading

    @invariant()
    def each_page_is_there_or_not(self) -> None:
        if self.fd >= 0:
            for shelf in self.shelves:
                there = [name for name in self.names if shelf.find([name])]
                assert set(there) == {name for region in self.regions for name in region.pages}
            counts = self.layout.counts(self.fd)
            assert [one.pages for one in counts] == [len(region.pages) for region in self.regions]

    def teardown(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)


TestShelfAsADict = ShelfAsADict.TestCase
TestShelfAsADict.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


def entries(fd: int) -> int:
    """Of the index of `SMALL`."""
    places = os.pread(fd, SMALL.headers - SMALL.places, SMALL.places)
    return int(np.count_nonzero(np.frombuffer(places, np.uint32)))


class Killed(BaseException):
    """Between two lines."""


def killed_after(lines: int, shelf: Shelf, name: PageName) -> bool:
    """Put the page, and die after so many lines of the shelf's code. False if it was complete before."""
    left = lines

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal left
        if frame.f_code.co_filename != module.__file__:
            return None
        if event == "line":
            left -= 1
            if left < 0:
                raise Killed
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        put(shelf, name)
    except Killed:
        return True
    finally:
        sys.settrace(before)
    return False


@pytest.mark.parametrize("full", [False, True], ids=["with room", "full"])
def test_wherever_a_rank_dies_its_pages_are_there_and_its_region_goes_on(full: bool) -> None:
    lines = 0
    dies = True
    while dies:
        lines += 1
        with shelf_file(SMALL) as fd:
            before = [name_of(number) for number in range(SMALL.slots if full else 2)]
            first = Shelf(fd, SMALL, 0)
            assert all(put(first, name) for name in before)
            dies = killed_after(lines, first, name_of(100))
            reader, second = Shelf(fd, SMALL, 1), Shelf(fd, SMALL, 0)
            for shelf in (reader, second):
                there = [name for name in before if got(shelf, name)]
                assert there[-1:] == before[-1:]
                assert len(there) >= len(before) - full
                got(shelf, name_of(100))
            assert entries(fd) == second.counts.pages, "the index has what is there, and nothing else"
            assert put(second, name_of(100))
            assert got(second, name_of(100))
            after = [name_of(200 + number) for number in range(SMALL.slots)]
            assert all(put(second, name) for name in after)
            assert reader.find(after) == len(after)
            assert not any(got(reader, name) for name in (*before, name_of(100)))
            assert second.counts.bad == reader.counts.bad == 0
    assert lines > 20, "it never died within"


def test_the_next_incarnation_evicts_in_the_order_of_use(fd: int) -> None:
    writer, reader = Shelf(fd, SMALL, 0), Shelf(fd, SMALL, 1)
    for number in (0, 1, 2, 3):
        put(writer, name_of(number))
    for number in (1, 0):
        assert got(writer, name_of(number))
    assert got(reader, name_of(3))
    # 3 is passed over once, as another rank has used it
    for new, gone in ((10, 2), (11, 1), (12, 0), (13, 10), (14, 3)):
        heir = Shelf(fd, SMALL, 0)
        assert heir.find([name_of(gone)])
        assert put(heir, name_of(new))
        assert not heir.find([name_of(gone)])


def test_a_page_that_two_regions_have_is_there_until_both_have_lost_it(fd: int) -> None:
    one, other = (Shelf(fd, SMALL, region) for region in range(2))
    name = name_of(0)
    assert put(one, name)
    assert put(other, name)
    for number in range(1, 1 + SMALL.slots):
        assert put(one, name_of(number))
    assert got(one, name)
    for number in range(1, 2 * SMALL.slots):  # it is passed over once, as it was used
        assert put(other, name_of(number))
    assert not one.find([name])
    assert not got(other, name)


def test_a_flipped_bit_of_a_page_is_found_counted_and_put_right(fd: int) -> None:
    writer, reader = Shelf(fd, SMALL, 0), Shelf(fd, SMALL, 1)
    names = [name_of(number) for number in range(3)]
    for name in names:
        put(writer, name)
    at = SMALL.page_at(0, 1) + 7
    os.pwrite(fd, bytes([os.pread(fd, 1, at)[0] ^ 4]), at)
    out = np.zeros((3, SMALL.page_bytes), np.uint8)
    assert reader.find(names) == 3, "nobody has looked yet"
    assert reader.get(names, out) == 1
    assert (reader.counts.bad, reader.counts.fetched) == (1, 1)
    assert writer.find(names) == reader.find(names) == 1
    assert writer.missing(names) == [1]
    assert put(writer, names[1])
    assert reader.get(names, out) == 3
    assert out.tobytes() == b"".join(content(name, SMALL.page_bytes) for name in names)
    assert reader.counts.bad == 1


def test_a_page_that_was_bad_is_not_there_for_the_next_incarnation_either(fd: int) -> None:
    writer, reader = Shelf(fd, SMALL, 0), Shelf(fd, SMALL, 1)
    put(writer, name_of(0))
    os.pwrite(fd, b"?", SMALL.page_at(0, 0) + 7)
    assert not got(reader, name_of(0))
    heir = Shelf(fd, SMALL, 0)
    assert (heir.counts.pages, entries(fd)) == (0, 0)
    assert put(heir, name_of(1))
    assert put(heir, name_of(0))
    assert got(reader, name_of(0))
    assert got(reader, name_of(1))


@pytest.mark.parametrize("bit", [0, 6])
@pytest.mark.parametrize("byte", range(HEADER_BYTES))
def test_whatever_is_wrong_with_a_header_no_wrong_page_is_got(fd: int, byte: int, bit: int) -> None:
    writer, reader = Shelf(fd, SMALL, 0), Shelf(fd, SMALL, 1)
    names = [name_of(number) for number in range(3)]
    for name in names:
        put(writer, name)
    at = SMALL.header_at(0, 1) + byte
    os.pwrite(fd, bytes([os.pread(fd, 1, at)[0] ^ 1 << bit]), at)
    assert [got(reader, name) for name in names][::2] == [True, True]
    assert all(put(writer, name) for name in names)
    assert all(got(reader, name) for name in (names[0], names[2]))
    again = Shelf(fd, SMALL, 0)
    assert all(put(again, name) for name in names)
    assert all(got(reader, name) for name in (names[0], names[2]))


def test_a_header_that_was_not_finished_is_no_page(fd: int) -> None:
    writer, reader = Shelf(fd, SMALL, 0), Shelf(fd, SMALL, 1)
    put(writer, name_of(0))
    sequence = struct.unpack("=Q", os.pread(fd, 8, SMALL.header_at(0, 0)))[0]
    os.pwrite(fd, struct.pack("=Q", sequence - 1), SMALL.header_at(0, 0))
    assert not reader.find([name_of(0)])
    assert not got(reader, name_of(0))
    assert reader.counts.bad == 0


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_reader_that_its_writer_overtakes_has_nothing(
    fd: int, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer, reader = Shelf(fd, SMALL, 0), Shelf(fd, SMALL, 1)
    for number in range(SMALL.slots):
        put(writer, name_of(number))
    read = os.preadv

    def overtaken(*arguments: Any) -> int:
        monkeypatch.undo()
        if when == "after":
            read(*arguments)
        put(writer, name_of(100))
        return SMALL.page_bytes if when == "after" else read(*arguments)

    monkeypatch.setattr(os, "preadv", overtaken)
    assert not got(reader, name_of(0))
    assert reader.counts.bad == 0
    assert got(reader, name_of(100))
    assert got(reader, name_of(1))


def test_without_memory_for_more_a_region_goes_on_with_what_it_has(
    fd: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = Shelf(fd, SMALL, 0)
    assert put(writer, name_of(0))
    assert put(writer, name_of(1))
    write, fails = os.pwrite, True

    def pwrite(file: int, data: Any, offset: int) -> int:
        if offset >= SMALL.page_at(0, 2) and fails:
            raise OSError(28, "no space")
        return write(file, data, offset)

    monkeypatch.setattr(os, "pwrite", pwrite)
    assert not put(writer, name_of(2))
    assert put(writer, name_of(3))
    assert not got(writer, name_of(0)), "the least recently used made room"
    assert got(writer, name_of(1))
    fails = False
    again = Shelf(fd, SMALL, 0)
    assert all(put(again, name_of(number)) for number in range(4))
    assert again.find([name_of(number) for number in range(4)]) == 4


def test_without_memory_for_a_header_there_is_no_page(fd: int, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = Shelf(fd, SMALL, 0)

    def refuse(*_: int) -> None:
        raise OSError(12, "no memory")

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    assert not put(writer, name_of(0))
    assert not got(writer, name_of(0))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("missing", [None, 0, 4, 8, 12])
def test_several_threads_get_what_one_does(threads: int, missing: int | None) -> None:
    layout = ShelfLayout(2, 20, 4096)
    with shelf_file(layout) as fd:
        writer, reader = Shelf(fd, layout, 0), Shelf(fd, layout, 1, threads=threads)
        names = [name_of(number) for number in range(13)]
        for place, name in enumerate(names):
            put(writer, name)
            if place == missing:
                os.pwrite(fd, b"?", layout.page_at(0, place) + 9)
        out = np.zeros((13, 4096), np.uint8)
        good = 13 if missing is None else missing
        assert reader.get(names, out) == good
        assert out[:good].tobytes() == b"".join(content(name, 4096) for name in names[:good])
        reader.close()


def test_what_does_not_fit_the_shelf_is_refused(fd: int) -> None:
    with pytest.raises(ValueError, match="bytes"):
        Shelf(fd, ShelfLayout(2, 5, 48), 0)
    with pytest.raises(ValueError, match="region 2"):
        Shelf(fd, SMALL, 2)
    shelf = Shelf(fd, SMALL, 0)
    for wrong in (
        np.zeros((1, 47), np.uint8),
        np.zeros((2, 48), np.uint8),
        np.zeros((1, 96), np.uint8)[:, ::2],
    ):
        with pytest.raises(ValueError, match="48 bytes"):
            shelf.put([name_of(0)], wrong)
        with pytest.raises(ValueError, match="48 bytes"):
            shelf.get([name_of(0)], wrong)


def test_names_that_the_index_cannot_tell_apart_are_different_pages(fd: int) -> None:
    alike = ALIKE
    writer, reader = Shelf(fd, SMALL, 0), Shelf(fd, SMALL, 1)
    assert put(writer, alike[0])
    assert put(writer, alike[1])
    assert [reader.find([name]) for name in alike] == [1, 1, 0]
    assert reader.find(alike) == reader.find(alike[:2]) == 2
    assert reader.missing(alike) == [2]
    assert reader.find([*alike[:2] * 5, alike[2]]) == 10
    assert [got(reader, name) for name in alike] == [True, True, False]


def test_a_header_with_another_name_is_not_that_page(fd: int) -> None:
    """The index cannot tell the two apart."""
    stored, wanted, _ = ALIKE
    writer, reader = Shelf(fd, SMALL, 0), Shelf(fd, SMALL, 1)
    put(writer, stored)
    os.pwrite(fd, wanted, SMALL.header_at(0, 0) + 8)
    assert reader.find([wanted]) == 1, "nobody has looked yet"
    assert not got(reader, wanted)
    assert reader.counts.bad == 1


def test_many_pages_find_room_in_the_index() -> None:
    layout = ShelfLayout(1, 3000, 8)
    with shelf_file(layout) as fd:
        shelf = Shelf(fd, layout, 0)
        names: Sequence[PageName] = [name_of(number) for number in range(2 * layout.slots)]
        assert all(put(shelf, name) for name in names)
        assert shelf.missing(names) == list(range(layout.slots))
        assert Shelf(fd, layout, 0).find(names[layout.slots :]) == layout.slots
        assert page(names[-1], 8).tobytes() == content(names[-1], 8)
