"""Which items of a batch make it fail: it runs again in halves, until each that fails does so by itself.

Pure, and the rank's own: it decides what the next step computes. One bad item of n is found after 2 log2 n more steps at
most, and every step that does not fail counts: the others' work in it stands.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

ItemT = TypeVar("ItemT")


class Bisection(Generic[ItemT]):
    """`groups` are to be run before anything else, each by itself, the last one first. No item is in two."""

    def __init__(self) -> None:
        self.groups: list[list[ItemT]] = []

    def take(self) -> list[ItemT]:
        """The batch to run now; empty when there is nothing left to find out."""
        return self.groups.pop() if self.groups else []

    def again(self, batch: Sequence[ItemT]) -> None:
        """The batch has not run, through no fault of its own."""
        if batch:
            self.groups.append(list(batch))

    def failed(self, batch: Sequence[ItemT]) -> ItemT | None:
        """The batch has failed: the culprit if it is one item, else its halves come next, the first one first."""
        if len(batch) == 1:
            return batch[0]
        half = (len(batch) + 1) // 2
        self.groups += [list(batch[half:]), list(batch[:half])]
        return None

    def forget(self, gone: Callable[[ItemT], bool]) -> None:
        """Items that nobody wants any more."""
        kept = [[item for item in group if not gone(item)] for group in self.groups]
        self.groups = [group for group in kept if group]

    def check(self) -> None:
        items = [id(item) for group in self.groups for item in group]
        assert len(set(items)) == len(items), "an item is in two groups"
        assert all(self.groups), "an empty group"
