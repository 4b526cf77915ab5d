"""Which pages of the KV cache are free. Page 0 is never given out: padding writes and reads go there."""

from __future__ import annotations

NULL_PAGE = 0


class KVPages:
    """`num_pages` pages, numbered from 1, of `page_size` tokens each."""

    def __init__(self, num_pages: int, page_size: int) -> None:
        self.page_size = page_size
        self.num_pages = num_pages
        self._free = list(range(num_pages, 0, -1))

    @property
    def free(self) -> int:
        return len(self._free)

    def pages_for(self, tokens: int) -> int:
        """Pages that hold `tokens` tokens."""
        return -(-tokens // self.page_size)

    def take(self, count: int) -> list[int] | None:
        """`count` pages, or None if there are not so many."""
        if count > len(self._free):
            return None
        return [self._free.pop() for _ in range(count)]

    def give_back(self, pages: list[int]) -> None:
        self._free.extend(reversed(pages))
