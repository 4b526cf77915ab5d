"""The shelf: copies of full pages in host memory, which outlive the rank that put them there.

A region belongs to a rank. Only its present incarnation writes there, and it begins when the one before has surely gone;
it then has the pages of its previous life. All ranks read all regions. Nobody locks: a reader copies a page, and then
looks whether it was that page all the time. In its header are sequence number, name and length, and a checksum of name
and bytes, so that a page which was written over meanwhile, or was never finished, is not there. What is written when:

1. the sequence number becomes odd: what was in the slot is gone;
2. the page's bytes;
3. the rest of the header, and at last an even sequence number;
4. the index. A reader may miss a page for that, but never get another.

Two words of a header are written by readers, too: that a page was used, and which sequence number had the wrong bytes. No
two pages of a slot have the same number, so at worst a page counts as used that was not.

HAZARD: memory that is mapped, and that the machine does not have when it is first written to, is a SIGBUS. So pages are
not mapped: they are read and written by system calls, which fail instead; and what is mapped is asked for beforehand. The
interpreter lock is free meanwhile, and no rank has page tables for all that others have stored.
"""

from __future__ import annotations

import mmap
import os
from array import array
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import takewhile

import numpy as np
import numpy.typing as npt
from isal.isal_zlib import crc32

from elastic_ep.kv.names import NAME_BYTES, PageName
from elastic_ep.kv.shelf_file import BUCKET_ENTRIES, HEADER_BYTES, LINE, RegionCounts, ShelfLayout

Bytes = npt.NDArray[np.uint8]
_Words = npt.NDArray[np.uint64]
_Numbers = npt.NDArray[np.int64]

_SEQUENCE, _NAME, _SUM, _TICK, _USED, _BAD = 0, 1, 3, 4, 5, 6
"""Words of a header. The name has two; _SUM is the length, and the checksum in the upper half."""
_CHECKED = 4
"""The words that say which page it is."""
_WORD = 8
_WORDS = HEADER_BYTES // _WORD
_ENTRY = 4
_HALF = 32
_LOWER = (1 << _HALF) - 1
_FEW = 8
"""So many names are looked up faster one by one than with arrays."""
_NO_PLACE = -1
_HEADERS_AT_ONCE = 64
"""That memory is asked for: those of a page of the machine's memory."""
_SLOTS, _PAGES, _STORED, _EVICTED, _FETCHED, _BAD_PAGES, _DROPPED = range(len(RegionCounts._fields))


class Shelf:
    """One rank's end; `fd` stays the caller's. `find` is for any thread, everything else for one.

    `threads` share the work of a `get`. Raises ValueError if the file has another layout.
    """

    def __init__(self, fd: int, layout: ShelfLayout, region: int, *, threads: int = 1) -> None:
        size = os.fstat(fd).st_size
        if size != layout.total or not 0 <= region < layout.regions:
            raise ValueError(f"no region {region} of {layout} in a shelf of {size} bytes")
        self._fd = fd
        self.layout = layout
        self._region = region
        self._threads = threads
        self._pool = ThreadPoolExecutor(threads, "shelf") if threads > 1 else None
        mapped = mmap.mmap(fd, layout.data)
        entries = (layout.buckets, layout.regions * BUCKET_ENTRIES)
        self._tags: npt.NDArray[np.uint32] = np.ndarray(entries, np.uint32, mapped, layout.tags)
        self._places: npt.NDArray[np.uint32] = np.ndarray(entries, np.uint32, mapped, layout.places)
        self._headers: _Words = np.ndarray(
            (layout.regions, layout.slots, _WORDS),
            np.uint64,
            mapped,
            layout.headers,
            (layout.region_headers, HEADER_BYTES, _WORD),
        )
        # One word at a time these are faster than arrays.
        view = memoryview(mapped)
        self._words = view.cast("Q")
        self._entries = view.cast("I")
        self._mask = layout.buckets - 1
        self._first_place, self._first_tag = layout.places // _ENTRY, layout.tags // _ENTRY
        self._first_header, self._region_words = layout.headers // _WORD, layout.region_headers // _WORD
        self._counts = view[region * LINE : (region + 1) * LINE].cast("q")
        self._order: OrderedDict[PageName, int] = OrderedDict()
        """Slots of this region's pages, the least recently used first."""
        self._free: list[int] = []
        """Slots that have been used, and have no page now."""
        self._most = layout.slots
        self._tick = 0
        self._inherit()

    @property
    def counts(self) -> RegionCounts:
        """Of this rank's region. Any thread."""
        return RegionCounts(*self._counts[: len(RegionCounts._fields)])

    def close(self) -> None:
        """No `get` any more."""
        if self._pool is not None:
            self._pool.shutdown()

    # Readers

    def find(self, names: Sequence[PageName]) -> int:
        """How many of the leading `names` are there."""
        return sum(1 for _ in takewhile(_is_place, self._locate(names)))

    def missing(self, names: Sequence[PageName]) -> list[int]:
        """Which of `names` are not there, as places in it. The others count as used."""
        places = self._locate(names)
        self._use(filter(_is_place, places))
        return [number for number, place in enumerate(places) if not _is_place(place)]

    def get(self, names: Sequence[PageName], out: Bytes) -> int:
        """Copy the leading pages to `out` [n, page_bytes]; how many of them were there, and whole."""
        self._check(names, out)
        places = list(takewhile(_is_place, self._locate(names)))
        pages = list(zip(names, places, out, strict=False))
        good = self._copy_shared(pages) if self._pool and len(pages) > 1 else self._copy_leading(pages)
        self._use(places[:good])
        self._counts[_FETCHED] += good
        return good

    def _copy_shared(self, pages: list[tuple[PageName, int, Bytes]]) -> int:
        assert self._pool is not None
        share = -(-len(pages) // self._threads)
        parts = [pages[start : start + share] for start in range(0, len(pages), share)]
        good = 0
        whole = True
        for part, copied in zip(parts, self._pool.map(self._copy_leading, parts), strict=True):
            good += copied if whole else 0
            whole = whole and copied == len(part)
        return good

    def _copy_leading(self, pages: list[tuple[PageName, int, Bytes]]) -> int:
        return sum(1 for _ in takewhile(lambda page: self._copy(*page), pages))

    def _copy(self, name: PageName, place: int, out: Bytes) -> bool:
        region, slot = divmod(place, self.layout.slots)
        at = self._header_at(region, slot)
        header = self._words[at : at + _CHECKED]
        checked = header.tobytes()
        sequence, _, _, summed = np.frombuffer(checked, np.uint64).tolist()
        here = checked[_NAME * _WORD : _SUM * _WORD] == name and summed & _LOWER == len(out)
        if sequence % 2 or not here:
            return False
        copied = os.preadv(self._fd, [out.data], self.layout.page_at(region, slot))
        if header.tobytes() != checked:
            return False  # overtaken by its writer
        if copied != len(out) or _checksum(name, out) != summed >> _HALF:
            self._words[at + _BAD] = sequence
            self._counts[_BAD_PAGES] += 1
            return False
        return True

    def _use(self, places: Iterable[int]) -> None:
        """Of other regions a hint: it may be another page by now."""
        for place in places:
            region, slot = divmod(place, self.layout.slots)
            at = self._header_at(region, slot)
            self._words[at + _USED] = region != self._region
            if region == self._region:
                self._touch(self._words[at + _NAME : at + _SUM].tobytes())

    def _locate(self, names: Sequence[PageName]) -> list[int]:
        """region * slots + slot of each name, -1 if it is not there; in this rank's own region if it is there, too."""
        if len(names) <= _FEW:
            return [self._place(name) for name in names]
        places: list[int] = self._places_of(names).tolist()
        return places

    def _place(self, name: PageName) -> int:
        buckets, wanted = self._key(name)
        width, found = self.layout.regions * BUCKET_ENTRIES, _NO_PLACE
        for bucket in buckets:
            start = self._first_tag + bucket * width
            tags = self._entries[start : start + width].tolist()
            if wanted not in tags:
                continue
            for entry, tag in enumerate(tags):
                slot = self._entries[self._first_place + bucket * width + entry] - 1
                if tag != wanted or not 0 <= slot < self.layout.slots:
                    continue
                region = entry // BUCKET_ENTRIES
                at = self._header_at(region, slot)
                header = self._words[at : at + _WORDS]
                if header[_NAME:_SUM].tobytes() == name and _is_whole(header):
                    found = region * self.layout.slots + slot
                    if region == self._region:
                        return found
        return found

    def _places_of(self, names: Sequence[PageName]) -> _Numbers:
        """As `_place`, of many."""
        found = np.full(len(names), _NO_PLACE)
        words: _Words = np.frombuffer(b"".join(names), np.uint64).reshape(-1, 2)
        buckets = self._buckets_of(words).reshape(-1)
        hits = np.flatnonzero(self._tags.take(buckets, 0) == np.tile(_tags_of(words), 2)[:, None])
        line, entry = np.divmod(hits, self._tags.shape[1])
        slot = self._places[buckets[line], entry].astype(np.int64) - 1
        region, which = entry // BUCKET_ENTRIES, line % len(names)
        known = (slot >= 0) & (slot < self.layout.slots)
        region, slot, which = region[known], slot[known], which[known]
        headers = self._headers[region, slot]
        good = _whole(headers) & (headers[:, _NAME:_SUM] == words[which]).all(axis=1)
        place, which = (region * self.layout.slots + slot)[good], which[good]
        found[which] = place
        own = region[good] == self._region
        found[which[own]] = place[own]
        return found

    def _buckets_of(self, words: _Words) -> _Numbers:
        """The two of each name: [2, n]."""
        mask = np.uint64(self._mask)
        return np.stack((words[:, 0] & mask, (words[:, 0] >> np.uint64(_HALF)) & mask)).astype(np.int64)

    # The writer

    def put(self, names: Sequence[PageName], pages: Bytes) -> int:
        """Each of `pages` [n, page_bytes], unless it is in this region already; how many are there now.

        There is no room for one only if the machine has no memory left.
        """
        self._check(names, pages)
        return sum(self._put(name, page) for name, page in zip(names, pages, strict=True))

    def note_dropped(self, pages: int) -> None:
        """So many were not put, for lack of time."""
        self._counts[_DROPPED] += pages

    def _check(self, names: Sequence[PageName], pages: Bytes) -> None:
        if pages.shape != (len(names), self.layout.page_bytes) or not pages.flags.c_contiguous:
            raise ValueError(
                f"an array of {pages.shape} for {len(names)} pages of {self.layout.page_bytes} bytes"
            )

    def _put(self, name: PageName, page: Bytes) -> bool:
        known = self._order.get(name)
        if known is not None:
            if _is_whole(self._header(known)):
                self._touch(name)
                return True
            self._remove(name)  # a reader has found it to be bad
        slot = self._take_slot()
        if slot is None:
            return False
        try:
            self._write(slot, page)
        except (
            OSError
        ):  # no memory: this slot is given up, and those that have some are all that there will be
            self._most = self._counts[_SLOTS]
            return False
        header = self._header(slot)
        header[_NAME:_SUM] = memoryview(name).cast("Q")
        header[_SUM] = self.layout.page_bytes | _checksum(name, page) << _HALF
        header[_USED] = 0
        header[_TICK] = self._tick = self._tick + 1
        header[_SEQUENCE] += 1
        self._order[name] = slot
        if not self._enter(name, slot):
            self._remove(name)
            return False
        self._counts[_STORED] += 1
        self._counts[_PAGES] = len(self._order)
        return True

    def _take_slot(self) -> int | None:
        """A slot without a page, whose sequence number is odd."""
        if self._free:
            return self._free.pop()
        slot = self._counts[_SLOTS]
        if slot < self._most and self._ask_for_header(slot):
            self._header(slot)[_SEQUENCE] |= 1
            self._counts[_SLOTS] = slot + 1
            return slot
        if not self._order:
            return None
        self._evict()
        return self._free.pop()

    def _ask_for_header(self, slot: int) -> bool:
        """Whether there is memory for it."""
        if slot % _HEADERS_AT_ONCE == 0:
            count = min(_HEADERS_AT_ONCE, self.layout.slots - slot)
            try:
                os.posix_fallocate(self._fd, self.layout.header_at(self._region, slot), count * HEADER_BYTES)
            except OSError:
                self._most = slot
                return False
        return True

    def _evict(self) -> None:
        """The least recently used. Those that other ranks have used since they came up last are passed over once."""
        for _ in range(len(self._order)):
            name = next(iter(self._order))
            header = self._header(self._order[name])
            if not header[_USED]:
                break
            header[_USED] = 0
            self._touch(name)
        self._remove(next(iter(self._order)))
        self._counts[_EVICTED] += 1

    def _remove(self, name: PageName) -> None:
        """The page is gone, and its slot free."""
        slot = self._order.pop(name)
        self._header(slot)[_SEQUENCE] |= 1
        for at in self._own_lines(name):
            line = self._line(at)
            if slot + 1 in line:
                self._set_entry(at + line.index(slot + 1), 0, 0)
        self._free.append(slot)
        self._counts[_PAGES] = len(self._order)

    def _enter(self, name: PageName, slot: int) -> bool:
        """Into the index, the emptier bucket. False if there is no room in either: that is next to never."""
        room, at = max((self._line(at).count(0), at) for at in self._own_lines(name))
        if room:
            self._set_entry(at + self._line(at).index(0), self._key(name)[1], slot + 1)
        return room > 0

    def _own_lines(self, name: PageName) -> list[int]:
        """Where this region's entries of the two buckets of a name begin, counted from the first bucket."""
        buckets, _ = self._key(name)
        return [(bucket * self.layout.regions + self._region) * BUCKET_ENTRIES for bucket in buckets]

    def _line(self, at: int) -> list[int]:
        start = self._first_place + at
        return self._entries[start : start + BUCKET_ENTRIES].tolist()

    def _set_entry(self, at: int, tag: int, place: int) -> None:
        self._entries[self._first_tag + at] = tag
        self._entries[self._first_place + at] = place

    def _write(self, slot: int, page: Bytes) -> None:
        offset, left = self.layout.page_at(self._region, slot), page.data
        while left:
            written = os.pwrite(self._fd, left, offset)
            left, offset = left[written:], offset + written

    def _touch(self, name: PageName) -> None:
        self._order.move_to_end(name)
        self._tick += 1
        self._header(self._order[name])[_TICK] = self._tick

    def _header(self, slot: int) -> memoryview[int]:
        """Of this region."""
        at = self._header_at(self._region, slot)
        return self._words[at : at + _WORDS]

    def _header_at(self, region: int, slot: int) -> int:
        return self._first_header + region * self._region_words + slot * _WORDS

    def _key(self, name: PageName) -> tuple[tuple[int, int], int]:
        """The two buckets of the index where a name may be, and its bits that are there."""
        first, second = memoryview(name).cast("Q")
        return (first & self._mask, first >> _HALF & self._mask), second & _LOWER

    # What is there already

    def _inherit(self) -> None:
        """Take over what the rank's previous incarnation has left: whole pages, and an index that may not fit them."""
        own = self._headers[self._region, : self._counts[_SLOTS]]
        whole = _whole(own)
        own[:, _SEQUENCE] |= (~whole).astype(np.uint64)
        self._free = np.flatnonzero(~whole).tolist()
        slots = np.flatnonzero(whole)
        slots = slots[np.argsort(own[slots, _TICK], kind="stable")]
        names = np.ascontiguousarray(own[slots, _NAME:_SUM]).tobytes()
        for number, slot in enumerate(slots.tolist()):
            self._order[names[number * NAME_BYTES : (number + 1) * NAME_BYTES]] = slot
        self._tick = int(own[slots, _TICK].max(initial=0))
        entered = self._mend_index(own, whole)
        for name, slot in list(self._order.items()):
            if not entered[slot] and not self._enter(name, slot):
                self._remove(name)
        self._counts[_PAGES:] = memoryview(array("q", [len(self._order), *[0] * (LINE // _WORD - _STORED)]))

    def _mend_index(self, own: _Words, whole: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
        """Take out entries of pages that are gone; whose slots are entered."""
        columns = slice(self._region * BUCKET_ENTRIES, (self._region + 1) * BUCKET_ENTRIES)
        tags, places = self._tags[:, columns], self._places[:, columns]
        bucket, entry = np.nonzero(places)
        slot = places[bucket, entry].astype(np.int64) - 1
        entered = np.zeros(len(own), bool)
        right = slot < len(own)
        right[right] = whole[slot[right]]
        names = own[slot[right], _NAME:_SUM]
        same = (self._buckets_of(names) == bucket[right]).any(axis=0)
        right[right] = same & (tags[bucket[right], entry[right]] == _tags_of(names))
        tags[bucket[~right], entry[~right]] = places[bucket[~right], entry[~right]] = 0
        entered[slot[right]] = True
        return entered


def _is_place(place: int) -> bool:
    return place != _NO_PLACE


def _tags_of(words: _Words) -> npt.NDArray[np.uint32]:
    return words[:, 1].astype(np.uint32)


def _is_whole(header: memoryview[int]) -> bool:
    sequence = header[_SEQUENCE]
    return sequence != 0 and sequence % 2 == 0 and sequence != header[_BAD]


def _whole(headers: _Words) -> npt.NDArray[np.bool_]:
    """Of `headers` [n, words]: whether the page is there, and nobody has found it to be bad."""
    sequence = headers[:, _SEQUENCE]
    whole: npt.NDArray[np.bool_] = (
        (sequence & np.uint64(1) == 0) & (sequence != 0) & (sequence != headers[:, _BAD])
    )
    return whole


def _checksum(name: PageName, page: Bytes | Iterable[int]) -> int:
    return crc32(page, crc32(name))
