"""Which hosts of a group reach each other, by what they say of their carriers, and whom to lose if two do not.

Each step needs rows of all hosts. So two that do not reach each other hold all up, though the controller hears both.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from itertools import combinations

from elastic_ep.timing import Timing
from elastic_ep.wire.host_messages import Links


@dataclass(slots=True)
class LinkTable:
    """`own` is the controller's host, which is never lost."""

    own: int
    said: dict[int, Links] = field(default_factory=dict)
    apart: dict[tuple[int, int], int] = field(default_factory=dict)
    """For so many looks in a row these two are."""

    def say(self, host: int, links: Links) -> None:
        self.said[host] = links

    def forget(self, host: int) -> None:
        """Its life is over."""
        self.said.pop(host, None)

    def apart_from(self, host: int, others: Iterable[int]) -> list[int]:
        """Those that it is not connected with, by its word or by theirs."""
        return [other for other in others if not (self._has(host, other) and self._has(other, host))]

    def look(self, hosts: Collection[int]) -> tuple[int, int] | None:
        """Once a beat: which of `hosts` to lose, for not reaching which other; None if all do, or may soon again.

        The one that is apart from more hosts, else that of the larger number.
        """
        pairs = [pair for pair in combinations(sorted(hosts), 2) if self.apart_from(pair[0], pair[1:])]
        self.apart = {pair: self.apart.get(pair, 0) + 1 for pair in pairs}
        over = [pair for pair, looks in self.apart.items() if looks > self._patience(pair)]
        if not over:
            return None
        of = Counter(host for pair in pairs for host in pair)
        lost = max(
            (host for pair in over for host in pair if host != self.own), key=lambda host: (of[host], host)
        )
        return lost, next(host for pair in over if lost in pair for host in pair if host != lost)

    def _patience(self, pair: tuple[int, int]) -> int:
        known = all(host not in self.said or self.said[host].known for host in pair)
        return Timing.apart_beats if known else Timing.agentless_beats

    def _has(self, host: int, other: int) -> bool:
        said = self.said.get(host)
        return said is not None and other in said.hosts
