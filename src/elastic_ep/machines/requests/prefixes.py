"""What prompts have in common, and which rank was given what: who has the beginning of a prompt computes the rest.

A prompt is told by its *marks*, each for a beginning of so many full pages (`DEPTHS`): the first few one by one, then
four while the length doubles, so the longest prompt has sixty, and what two prompts share is known to a fifth of it.
HAZARD: `beginnings` are hashes of a client's text, against which texts can be tried, and stay in the memory of the run
process. A mark is a number that stands for one of them in this run, given when it is first met. Marks tell which prompts
begin alike, and are in the event log: what is decided by them can be replayed.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import pairwise

MOST_MARKS = 1 << 14
"""That are remembered, of all prompts: those of about a thousand conversations. HAZARD: to take them as they are, for
the event log, costs the event loop a few milliseconds."""
_EACH_TO = 8
_LONGEST = 1 << 16
_BYTES = 16


def _depths() -> tuple[int, ...]:
    found = list(range(1, _EACH_TO + 1))
    while found[-1] < _LONGEST:
        found.append(found[-1] + (1 << found[-1].bit_length() - 3))
    return tuple(found)


DEPTHS = _depths()
"""Of a prompt's marks, how many full pages each stands for."""


def marks_of(tokens: int, page_size: int) -> int:
    """How many marks a prompt of so many tokens has at most."""
    return bisect_right(DEPTHS, tokens // page_size)


def beginnings(tokens: Sequence[int], page_size: int) -> tuple[bytes, ...]:
    """Of each of the prompt's beginnings a hash; 16 thousand tokens take half a millisecond."""
    ends = [depth * page_size for depth in DEPTHS[: marks_of(len(tokens), page_size)]]
    if not ends:
        return ()
    text, so_far, found = (
        memoryview(array("i", tokens[: ends[-1]])).cast("B"),
        blake2b(digest_size=_BYTES),
        [],
    )
    size = len(text) // ends[-1]
    for start, end in pairwise([0, *ends]):
        so_far.update(text[start * size : end * size])
        found.append(so_far.copy().digest())
    return tuple(found)


@dataclass(slots=True)
class Prefixes:
    """Which ranks were given which beginnings; of `most` marks, the most recently given."""

    most: int = MOST_MARKS
    given_to: OrderedDict[int, int] = field(default_factory=OrderedDict)
    """By mark, a bit for each rank; to be forgotten from the front."""

    def give(self, marks: Sequence[int], rank: int) -> None:
        """The rank will have them. Of a prompt the deepest is forgotten first: it is of no use without the others."""
        given_to = self.given_to
        for mark in reversed(marks):
            given_to[mark] = given_to.get(mark, 0) | 1 << rank
            given_to.move_to_end(mark)
        while len(given_to) > self.most:
            given_to.popitem(last=False)

    def forget(self, rank: int) -> None:
        """What the rank was given is gone. HAZARD: some milliseconds, if there is much: not while survivors wait."""
        for mark, ranks in list(self.given_to.items()):
            left = ranks & ~(1 << rank)
            if left:
                self.given_to[mark] = left
            else:
                del self.given_to[mark]

    def best(self, marks: Sequence[int], ranks: int, least: int = 1) -> int:
        """Those of `ranks` that have the longest beginning; all of them if nobody has `least` pages. Both are bits."""
        best, longest = ranks, 0
        for mark, depth in zip(marks, DEPTHS, strict=False):
            having = best & self.given_to.get(mark, 0)
            if not having:
                break
            best, longest = having, depth
        return best if longest >= least else ranks


class MarkNumbers:
    """The marks of beginnings: the same number for the same beginning, as long as it is among the last `most` met."""

    def __init__(self, most: int = MOST_MARKS) -> None:
        self._most = most
        self._numbers: OrderedDict[bytes, int] = OrderedDict()
        self._next = 0

    def of(self, beginnings: Sequence[bytes]) -> tuple[int, ...]:
        numbers, found = self._numbers, []
        for name in beginnings:
            if name not in numbers:
                numbers[name] = self._next
                self._next += 1
            found.append(numbers[name])
        for name in reversed(beginnings):
            numbers.move_to_end(name)
        while len(numbers) > self._most:
            numbers.popitem(last=False)
        return tuple(found)
