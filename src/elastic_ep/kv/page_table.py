"""Which pages of a device's KV cache are held, named, and free; which is evicted. No IO, no tensors.

A page is *free*, *held* by one or more (sequences, copies in progress: they are counted), or *kept*: nobody holds it, but
it has a name, so who needs its tokens next has them for nothing. Where no page is free, the kept one that was let go of
first is evicted. Of a sequence the last page is let go of first: a page is of no use without those before it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

from elastic_ep.kv.names import PageName

NULL_PAGE = 0
"""Never given out: padding writes and reads go there."""


class PageTable:
    """`num_pages` pages, numbered from 1, of `page_size` tokens each."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.page_size = page_size
        self.num_pages = num_pages
        self.evictions = 0
        self._free = list(range(num_pages, 0, -1))
        self._holders: dict[int, int] = {}
        """Of the held pages, how many hold it."""
        self._kept: OrderedDict[int, None] = OrderedDict()
        """To be evicted from the front."""
        self._names: dict[int, PageName] = {}
        self._by_name: dict[PageName, int] = {}

    @property
    def free(self) -> int:
        """Pages that `take` could give: those that are kept, too."""
        return len(self._free) + len(self._kept)

    @property
    def held(self) -> int:
        return len(self._holders)

    @property
    def named(self) -> int:
        return len(self._names)

    def pages_for(self, tokens: int) -> int:
        """Pages that hold `tokens` tokens."""
        return -(-tokens // self.page_size)

    def take(self, count: int) -> list[int] | None:
        """`count` pages, now held; None if there are not so many."""
        if count > self.free:
            return None
        while len(self._free) < count:
            self._evict()
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._holders[page] = 1
        return pages

    def find(self, names: Iterable[PageName]) -> list[int]:
        """The pages of the leading `names` that are here."""
        pages = []
        for name in names:
            page = self._by_name.get(name)
            if page is None:
                break
            pages.append(page)
        return pages

    def unheld(self, pages: Iterable[int]) -> int:
        """How many of `pages` nobody holds."""
        return sum(page not in self._holders for page in pages)

    def hold(self, pages: Iterable[int]) -> None:
        """Pages that are held, or kept, are held once more."""
        for page in pages:
            self._kept.pop(page, None)
            self._holders[page] = self._holders.get(page, 0) + 1

    def release(self, pages: Sequence[int]) -> None:
        """What `take` gave, or `hold` was told; of a sequence, all that it has, in its order."""
        for page in reversed(pages):
            left = self._holders[page] - 1
            if left:
                self._holders[page] = left
                continue
            del self._holders[page]
            if page in self._names:
                self._kept[page] = None
            else:
                self._free.append(page)

    def name(self, page: int, name: PageName) -> bool:
        """A held page is full, and committed. False if another page has that name already: this one gets none."""
        if name in self._by_name:
            return False
        self._names[page] = name
        self._by_name[name] = page
        return True

    def _evict(self) -> None:
        page, _ = self._kept.popitem(last=False)
        del self._by_name[self._names.pop(page)]
        self._free.append(page)
        self.evictions += 1

    # For searches and tests

    def state(self) -> tuple[object, ...]:
        """Equal for tables that go on in the same way."""
        return (
            tuple(self._free),
            tuple(sorted(self._holders.items())),
            tuple(self._kept),
            tuple(sorted(self._names.items())),
        )

    def check(self) -> None:
        """Raises AssertionError."""
        everywhere = [*self._free, *self._holders, *self._kept]
        assert sorted(everywhere) == list(range(1, self.num_pages + 1)), "a page is in two places, or in none"
        assert all(count > 0 for count in self._holders.values()), "held by nobody"
        assert self._kept.keys() <= self._names.keys(), "kept without a name"
        assert not self._names.keys() & set(self._free), "a free page has a name"
        assert {name: page for page, name in self._names.items()} == self._by_name
