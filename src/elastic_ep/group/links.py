"""Which hosts of a group reach each other, by what they say of their carriers, and whom to lose if two do not.

Each step needs rows of all hosts. So two that do not reach each other hold all up, though the controller hears both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from itertools import combinations

from elastic_ep.timing import Timing
from elastic_ep.wire.host_messages import Links


class LinkTable:
    """`own` is the controller's host, which is never lost."""

    def __init__(self, own: int, timing: Timing) -> None:
        self._own = own
        self._timing = timing
        self._said: dict[int, Links] = {}
        self._apart: Counter[tuple[int, int]] = Counter()
        """For so many looks in a row these two are."""

    def say(self, host: int, links: Links) -> None:
        self._said[host] = links

    def forget(self, host: int) -> None:
        """Its life is over."""
        self._said.pop(host, None)

    def apart_from(self, host: int, others: Iterable[int]) -> list[int]:
        """Those that it is not connected with, by its word or by theirs."""
        return [other for other in others if not (self._has(host, other) and self._has(other, host))]

    def look(self, hosts: Collection[int]) -> tuple[int, int] | None:
        """Once a beat: which of `hosts` to lose, for not reaching which other; None if all do, or may soon again.

        The one that is apart from more hosts, else that of the larger number.
        """
        pairs = [pair for pair in combinations(sorted(hosts), 2) if self.apart_from(pair[0], pair[1:])]
        self._apart = Counter({pair: self._apart[pair] + 1 for pair in pairs})
        over = [pair for pair, looks in self._apart.items() if looks > self._patience(pair)]
        if not over:
            return None
        of = Counter(host for pair in pairs for host in pair)
        lost = max(
            (host for pair in over for host in pair if host != self._own), key=lambda host: (of[host], host)
        )
        return lost, next(host for pair in over if lost in pair for host in pair if host != lost)

    def _patience(self, pair: tuple[int, int]) -> int:
        known = all(host not in self._said or self._said[host].known for host in pair)
        return self._timing.apart_beats if known else self._timing.agentless_beats

    def _has(self, host: int, other: int) -> bool:
        said = self._said.get(host)
        return said is not None and other in said.hosts
