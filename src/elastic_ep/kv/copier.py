"""Moves pages between a rank's KV cache and the shelf, on a thread of its own: no step waits for it.

What streams wait for goes first: fetches before stores. Where stores come faster than they can be made, the oldest that
wait are let go: who needs those pages computes them.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import structlog

from elastic_ep.kv.names import PageName
from elastic_ep.kv.shelf_file import RegionCounts

Bytes = npt.NDArray[np.uint8]
MOST_WAITING_BYTES = 256 << 20
"""Of pages that wait to be stored: they are held meanwhile."""
CLOSE_S = 2.0
"""How long the end of a copy may take: one of a batch takes milliseconds."""
log = structlog.get_logger()


class PageMover(Protocol):
    """A device's end. Used by one thread at a time. Raises what the device does."""

    page_bytes: int
    most: int
    """Pages at once."""

    def read(self, pages: Sequence[int]) -> Bytes:
        """[n, page_bytes], valid until the next call."""
        ...

    def staging(self, n: int) -> Bytes:
        """[n, page_bytes] where data for `write` is best put."""
        ...

    def write(self, pages: Sequence[int], data: Bytes) -> None:
        """`data` [n, page_bytes]. Returns when the pages have it."""
        ...


class Shelf(Protocol):
    """The host's end: kv/shelf.py."""

    def find(self, names: Sequence[PageName]) -> int:
        """How many of the leading `names` are there."""
        ...

    def missing(self, names: Sequence[PageName]) -> list[int]:
        """Which of `names` are not there, as places in it. The others count as used."""
        ...

    def put(self, names: Sequence[PageName], pages: Bytes) -> int:
        """Each of `pages` [n, page_bytes], if there is room; how many are there now."""
        ...

    def get(self, names: Sequence[PageName], out: Bytes) -> int:
        """Copy the leading pages to `out` [n, page_bytes]; how many of them were there, and whole."""
        ...

    def note_dropped(self, pages: int) -> None:
        """So many were not put, for lack of time."""
        ...

    @property
    def counts(self) -> RegionCounts:
        """What is there of this rank, and what this incarnation has done."""
        ...


class Done(NamedTuple):
    """Copies that are over. `fetched`: ticket, and how many of the leading pages are in the KV cache now."""

    stored: list[int]
    fetched: list[tuple[int, int]]


class _Fetch(NamedTuple):
    ticket: int
    names: Sequence[PageName]
    pages: Sequence[int]


class PageCopier:
    """Everything but `close` and `counts` is the forward thread's, and never waits for a copy."""

    def __init__(self, shelf: Shelf, mover: PageMover) -> None:
        self.page_bytes = mover.page_bytes
        self._shelf = shelf
        self._mover = mover
        self._most_waiting = max(mover.most, MOST_WAITING_BYTES // mover.page_bytes)
        self._stores: deque[tuple[PageName, int]] = deque()
        self._fetches: deque[_Fetch] = deque()
        self._stored: deque[int] = deque()
        self._fetched: deque[tuple[int, int]] = deque()
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._main, name="page-copier", daemon=True)
        self._thread.start()

    @property
    def counts(self) -> RegionCounts:
        """Any thread."""
        return self._shelf.counts

    @property
    def closing(self) -> bool:
        return self._closing

    def on_shelf(self, name: PageName) -> bool:
        return self._shelf.find([name]) == 1

    def store(self, pages: Sequence[tuple[PageName, int]]) -> None:
        """Those that are on the shelf already count as stored."""
        with self._wake:
            self._stores.extend(pages)
            most = 0 if self._closing else self._most_waiting
            dropped = [self._stores.popleft()[1] for _ in range(len(self._stores) - most)]
            self._wake.notify()
        if dropped:
            self._stored.extend(dropped)
            self._shelf.note_dropped(len(dropped))

    def fetch(self, ticket: int, names: Sequence[PageName], pages: Sequence[int]) -> None:
        """From the first on, as far as they are there. One that fails is one of fewer pages."""
        with self._wake:
            if self._closing:
                self._fetched.append((ticket, 0))
            else:
                self._fetches.append(_Fetch(ticket, names, pages))
            self._wake.notify()

    def take_done(self) -> Done:
        stored, fetched = self._stored, self._fetched
        return Done(
            [stored.popleft() for _ in range(len(stored))], [fetched.popleft() for _ in range(len(fetched))]
        )

    def close(self) -> None:
        """Begin nothing more: what waits is over. Waits for the copy in progress, but not for a device that hangs."""
        with self._wake:
            self._closing = True
            self._stored.extend(page for _, page in self._stores)
            self._fetched.extend((fetch.ticket, 0) for fetch in self._fetches)
            self._stores.clear()
            self._fetches.clear()
            self._wake.notify()
        self._thread.join(CLOSE_S)
        if self._thread.is_alive():
            log.warning("a copy of pages does not end", seconds=CLOSE_S)

    # The copier's thread

    def _main(self) -> None:
        while True:
            with self._wake:
                while not (self._fetches or self._stores or self._closing):
                    self._wake.wait()
                if self._closing:
                    return
                fetch = self._fetches.popleft() if self._fetches else None
                most = 0 if fetch else min(self._mover.most, len(self._stores))
                stores = [self._stores.popleft() for _ in range(most)]
            if fetch:
                self._fetched.append((fetch.ticket, self._fetch(fetch)))
            else:
                self._store(stores)
                self._stored.extend(page for _, page in stores)

    def _store(self, stores: Sequence[tuple[PageName, int]]) -> None:
        try:
            new = [stores[place] for place in self._shelf.missing([name for name, _ in stores])]
            if new:
                data = self._mover.read([page for _, page in new])
                self._shelf.put([name for name, _ in new], data)
        except Exception:
            log.exception("pages cannot be put on the shelf", pages=len(stores))

    def _fetch(self, fetch: _Fetch) -> int:
        """The leading pages that are in the KV cache now."""
        good = 0
        try:
            while good < len(fetch.names):
                names = fetch.names[good : good + self._mover.most]
                data = self._mover.staging(len(names))
                found = self._shelf.get(names, data)
                if found:
                    self._mover.write(fetch.pages[good : good + found], data[:found])
                good += found
                if found < len(names):
                    break
        except Exception:
            log.exception("pages cannot be fetched from the shelf", pages=len(fetch.names))
        return good
