"""Which rank holds which experts of one layer, and the changes that make it tolerant, of lost hosts too, then even.

A plan for a large model takes tens of thousands of changes: orders that a change leaves almost as they were are kept, and
what many changes have in common is looked at once.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator, Sequence
from itertools import chain
from math import inf, sqrt
from typing import NamedTuple

from elastic_ep.placement import most_hosts

NEGLIGIBLE = 1e-3
"""A change that takes less than this share of the mean off the busiest rank is not worth its bytes."""
CANDIDATES = 24
"""Only so many of the least busy ranks are looked at as takers."""
REPLACED = 4
"""Only so many copies, of so many experts, are looked at as making room for one more of a busy one."""


def imbalance_of(loads: Sequence[float]) -> float:
    """Max/mean; 1 if there is no load."""
    total = sum(loads)
    return max(loads) * len(loads) / total if total > 0 else 1.0


NOBODY = -1
_Places = tuple[tuple[int, int], ...]
"""(expert, rank) each."""
_Idea = tuple[float, bool, _Places, _Places]
"""What it takes off the busiest rank at most, and whether that is sure; copies to drop and to add."""


class Edit(NamedTuple):
    """Copies to drop, to add, and to move, (expert, giver, taker)."""

    drop: _Places = ()
    add: _Places = ()
    move: tuple[tuple[int, int, int], ...] = ()

    @property
    def moved(self) -> int:
        """Experts that come to a rank."""
        return len(self.add) + len(self.move)


class Board:
    """`room[rank]` slots, on host `hosts[rank]` (nothing: all on one). `least` copies of every expert, on `spread` hosts,
    are what slots allow."""

    def __init__(self, loads: Sequence[float], room: Sequence[int], hosts: Sequence[int] = ()) -> None:
        self.loads = loads
        self.total = sum(loads)
        self.room = list(room)
        ranks = len(room)
        self.least = max(1, min(ranks, sum(room) // len(loads)))
        self.hosts = list(hosts) or [0] * ranks
        rooms = [
            sum(n for n, on in zip(room, self.hosts, strict=True) if on == host) for host in set(self.hosts)
        ]
        self.spread = most_hosts(rooms, len(loads), self.least)
        self.holds: list[set[int]] = [set() for _ in range(ranks)]
        self.where: list[set[int]] = [set() for _ in loads]
        self.share = list(loads)
        """The load of one copy of each expert."""
        self.busy = [0.0] * ranks
        """Expected load of each rank."""
        self._spare: list[tuple[float, int]] = []
        """While balancing: experts with more than `least` copies, by the load of one with a copy less."""
        self._light: list[tuple[float, int]] = []
        """While balancing: all experts, by the load of a copy with one more."""

    @property
    def imbalance(self) -> float:
        return imbalance_of(self.busy)

    def copy(self) -> Board:
        other = Board(self.loads, self.room, self.hosts)
        other.holds = [set(experts) for experts in self.holds]
        other.where = [set(ranks) for ranks in self.where]
        other.share = list(self.share)
        other.busy = list(self.busy)
        return other

    def rename(self, names: Sequence[int]) -> None:
        """Call each rank `names[rank]` from now on, which is one with as much room, on the same host."""
        for name, experts, busy in list(zip(names, self.holds, self.busy, strict=True)):
            self.holds[name], self.busy[name] = experts, busy
        self.where = [{names[rank] for rank in ranks} for ranks in self.where]

    def above(self, imbalance: float) -> int:
        """How many ranks have more than so many times the mean load."""
        limit = imbalance * self.total / len(self.room)
        return sum(busy > limit for busy in self.busy)

    def moves_to(self, other: Board) -> int:
        """How many experts come to ranks that do not hold them here."""
        return sum(len(new - old) for new, old in zip(other.holds, self.holds, strict=True))

    def has_room(self, rank: int) -> bool:
        return len(self.holds[rank]) < self.room[rank]

    def fits(self, expert: int, rank: int) -> bool:
        """Whether `rank` may get a copy."""
        return rank not in self.where[expert]

    def hosts_of(self, expert: int) -> set[int]:
        return {self.hosts[rank] for rank in self.where[expert]}

    def is_short(self, expert: int) -> bool:
        """Whether it has fewer copies, or is on fewer hosts, than slots allow."""
        return len(self.where[expert]) < self.least or (
            self.spread > 1 and len(self.hosts_of(expert)) < self.spread
        )

    @property
    def short(self) -> int:
        return sum(map(self.is_short, range(len(self.where))))

    def can_spare(self, expert: int, rank: int) -> bool:
        """Whether `rank` may drop its copy."""
        if len(self.where[expert]) <= self.least:
            return False
        return self.spread == 1 or len(self._hosts_without(expert, rank)) >= self.spread

    def may_move(self, expert: int, giver: int, taker: int) -> bool:
        """Whether `taker` may get the copy of `giver`, as far as hosts are concerned: it is on as many as it should be,
        or as it is now."""
        if self.spread == 1 or self.hosts[giver] == self.hosts[taker]:
            return True
        after = self._hosts_without(expert, giver) | {self.hosts[taker]}
        return len(after) >= min(self.spread, len(self.hosts_of(expert)))

    def _hosts_without(self, expert: int, rank: int) -> set[int]:
        return {self.hosts[other] for other in self.where[expert] if other != rank}

    def place(self, expert: int, rank: int) -> None:
        """`add` without the loads; `count_loads` then."""
        self.holds[rank].add(expert)
        self.where[expert].add(rank)

    def count_loads(self) -> None:
        self.share = [load / max(1, len(ranks)) for load, ranks in zip(self.loads, self.where, strict=True)]
        self.busy = [0.0] * len(self.room)
        for share, ranks in zip(self.share, self.where, strict=True):
            for rank in ranks:
                self.busy[rank] += share

    def add(self, expert: int, rank: int) -> None:
        self._spread(expert, len(self.where[expert]) + 1)
        self.place(expert, rank)
        self.busy[rank] += self.share[expert]

    def drop(self, expert: int, rank: int) -> None:
        self.busy[rank] -= self.share[expert]
        self.holds[rank].discard(expert)
        self.where[expert].discard(rank)
        self._spread(expert, len(self.where[expert]))

    def move(self, expert: int, giver: int, taker: int) -> None:
        share = self.share[expert]
        self.holds[giver].discard(expert)
        self.where[expert].discard(giver)
        self.busy[giver] -= share
        self.place(expert, taker)
        self.busy[taker] += share

    def apply(self, edit: Edit) -> None:
        for expert, giver, taker in edit.move:
            self.move(expert, giver, taker)
        for expert, rank in edit.drop:
            self.drop(expert, rank)
        for expert, rank in edit.add:
            self.add(expert, rank)

    def _spread(self, expert: int, copies: int) -> None:
        """The expert's load over so many copies, of which those that are there get their share."""
        load = self.loads[expert]
        share = load / max(1, copies)
        more = share - self.share[expert]
        for rank in self.where[expert]:
            self.busy[rank] += more
        self.share[expert] = share
        if self._light:
            self._rerank(expert, copies)

    def _rerank(self, expert: int, copies: int) -> None:
        load = self.loads[expert]
        for before in (copies - 1, copies + 1):
            _take_out(self._light, (load / (before + 1), expert))
            if before > self.least:
                _take_out(self._spare, (load / (before - 1), expert))
        insort(self._light, (load / (copies + 1), expert))
        if copies > self.least:
            insort(self._spare, (load / (copies - 1), expert))

    # Tolerance

    def restore(self) -> None:
        """Give every expert `least` copies on `spread` hosts where that can be, and no rank more than it has room for."""
        for rank in range(len(self.room)):
            while len(self.holds[rank]) > self.room[rank] and self._make_way(rank):
                pass
        needy = [expert for expert in range(len(self.where)) if self.is_short(expert)]
        for expert in sorted(
            needy, key=lambda expert: (len(self.where[expert]), -self.loads[expert], expert)
        ):
            while self.is_short(expert) and self._provide(expert):
                pass

    def _make_way(self, rank: int) -> bool:
        """Drop what is most easily missed, or move it to a rank with room."""
        surplus = [e for e in self.holds[rank] if self.can_spare(e, rank)]
        if surplus:
            self.drop(min(surplus, key=lambda e: (self.share[e], e)), rank)
            return True
        for expert in sorted(self.holds[rank]):
            for taker in self._with_room():
                if self.fits(expert, taker) and self.may_move(expert, rank, taker):
                    self.move(expert, rank, taker)
                    return True
        return False

    def _provide(self, expert: int) -> bool:
        """One more copy: into a free slot, in place of a copy that is not needed, or of one that finds another place.

        On one more host if it should be on more; else, or if that cannot be had, anywhere if copies are lacking. What it
        has too many then it gives away.
        """
        apart = self.spread > 1 and len(self.hosts_of(expert)) < self.spread
        edit = next(self._ways_in(expert, apart), None)
        if edit is None and apart and len(self.where[expert]) < self.least:
            edit = next(self._ways_in(expert, apart=False), None)
        if edit is None:
            return False
        self.apply(edit)
        return True

    def _ways_in(self, expert: int, apart: bool) -> Iterator[Edit]:
        by_load = sorted(range(len(self.room)), key=lambda rank: (self.busy[rank], rank))
        closed = self.hosts_of(expert) if apart else ()
        takers = [rank for rank in by_load if self.fits(expert, rank) and self.hosts[rank] not in closed]
        for rank in takers:
            if self.has_room(rank):
                yield Edit(add=((expert, rank),))
        if apart and len(self.where[expert]) >= self.least:
            yield from self._exchanges(expert, takers)
        for rank in takers:
            for other in sorted(self.holds[rank]):
                if self.can_spare(other, rank):
                    yield Edit(drop=((other, rank),), add=((expert, rank),))
        for rank in takers:
            for other in sorted(self.holds[rank]):
                for second in self._with_room():
                    if self.fits(other, second) and self.may_move(other, rank, second):
                        yield Edit(move=((other, rank, second),), add=((expert, rank),))

    def _exchanges(self, expert: int, takers: Sequence[int]) -> Iterator[Edit]:
        """A copy that shares its host with another changes places with one on a host that has none: for nothing."""
        for giver in sorted(self.where[expert]):
            if self.hosts[giver] not in self._hosts_without(expert, giver):
                continue
            for taker in takers:
                for other in sorted(self.holds[taker]):
                    if self.fits(other, giver) and self.may_move(other, taker, giver):
                        yield Edit(move=((expert, giver, taker), (other, taker, giver)))

    def _with_room(self) -> list[int]:
        free = [rank for rank, held in enumerate(self.holds) if len(held) < self.room[rank]]
        return sorted(free, key=lambda rank: (self.busy[rank], rank))

    # Balance

    def balance(self, goal: float, max_moves: int, max_edits: int, useful: float = inf) -> None:
        """Make the busiest rank less busy until max/mean is at `goal`, moving at most so many experts.

        Given up when by far more ranks than at first are above `useful`: the load only goes round.
        """
        ranks = len(self.room)
        mean = self.total / ranks
        most_above = self.above(useful) + sqrt(ranks)
        copies = [(expert, len(holders)) for expert, holders in enumerate(self.where)]
        self._light = sorted((self.loads[expert] / (n + 1), expert) for expert, n in copies)
        self._spare = sorted((self.loads[expert] / (n - 1), expert) for expert, n in copies if n > self.least)
        by_load = list(range(ranks))
        for _ in range(max_edits):
            by_load.sort(key=self.busy.__getitem__)
            if self.busy[by_load[-1]] <= goal * mean:
                return
            if ranks - bisect_right(by_load, useful * mean, key=self.busy.__getitem__) > most_above:
                return
            edit = self._best_edit(by_load, goal * mean, mean * NEGLIGIBLE, max_moves)
            if edit is None:
                return
            self.apply(edit)
            max_moves -= edit.moved

    def _best_edit(
        self, by_load: Sequence[int], goal: float, negligible: float, max_moves: int
    ) -> Edit | None:
        """What takes most load off the busiest rank for each expert moved, making no other as busy."""
        busiest = by_load[-1]
        peak = self.busy[busiest]
        mine = sorted(self.holds[busiest], key=lambda e: (-self.share[e], e))
        takers = [rank for rank in by_load[:CANDIDATES] if rank != busiest]
        best, most = self._best_exchange(busiest, mine, takers, negligible)
        if best is not None and best.moved <= max_moves and most * best.moved >= (peak - goal) / 2:
            return best
        if best is not None and best.moved > max_moves:
            best, most = None, negligible
        for eased, sure, drop, add in chain(
            self._replications(peak, mine, takers), self._replacements(busiest, mine)
        ):
            if eased > most and len(add) <= max_moves:
                gain = eased if sure else peak - self._peak_after(drop, add)
                if gain > most:
                    best, most = Edit(drop, add), gain
        return best

    def _best_exchange(
        self, busiest: int, mine: Sequence[int], takers: Sequence[int], negligible: float
    ) -> tuple[Edit | None, float]:
        """The busiest rank hands an expert over, for a slot or for one with less load. As many copies as before.

        HAZARD: here a plan spends most of its time; no call, and no order that does not matter, in the inner loops.
        """
        share, where, holds, room, busy = self.share, self.where, self.holds, self.room, self.busy
        bound = self.spread > 1
        ours = [(share[expert], expert) for expert in mine]
        peak = busy[busiest]
        best, most = (0, 0, NOBODY), negligible
        for taker in takers:
            gap = peak - busy[taker]
            if gap <= 2 * most:  # half of it is the best of all shifts, and the next takers are busier
                break
            if len(holds[taker]) < room[taker]:
                for load, expert in ours:
                    gain = load if load < gap - load else gap - load
                    if gain > most and taker not in where[expert]:
                        if bound and not self.may_move(expert, busiest, taker):
                            continue
                        best, most = (expert, taker, NOBODY), gain
            if gap <= 4 * most:  # two experts move
                continue
            for other in holds[taker]:
                theirs = share[other]
                for load, expert in ours:
                    shift = load - theirs
                    if shift <= 2 * most:
                        break
                    gain = (shift if shift < gap - shift else gap - shift) / 2
                    if gain > most and taker not in where[expert] and busiest not in where[other]:
                        if bound and not (
                            self.may_move(expert, busiest, taker) and self.may_move(other, taker, busiest)
                        ):
                            continue
                        best, most = (expert, taker, other), gain
        expert, taker, other = best
        if most == negligible:
            return None, negligible
        back = () if other == NOBODY else ((other, taker, busiest),)
        return Edit(move=((expert, busiest, taker), *back)), most

    def _replications(self, peak: float, mine: Sequence[int], takers: Sequence[int]) -> Iterator[_Idea]:
        """One more copy of what the busiest rank holds: in a free slot, or in place of one that others miss least."""
        then = [(expert, self.loads[expert] / (len(self.where[expert]) + 1)) for expert in mine]
        for taker in filter(self.has_room, takers):
            for expert, share in then:
                if self.fits(expert, taker):
                    eased = min(self.share[expert] - share, peak - self.busy[taker] - share)
                    yield eased, True, (), ((expert, taker),)
        for alone, other in self._spare[:REPLACED]:
            spared = [rank for rank in sorted(self.where[other]) if self.can_spare(other, rank)]
            for place in sorted(spared, key=self.busy.__getitem__)[:REPLACED]:
                left = peak - self.busy[place] + self.share[other]
                heir, least = self._heir(other, place, alone)
                for expert, share in then[:REPLACED]:
                    if expert != other and self.fits(expert, place):
                        eased = min(self.share[expert] - share, left - share)
                        sure = eased <= peak - least or heir not in self.where[expert]
                        yield (
                            min(eased, peak - least) if sure else eased,
                            sure,
                            ((other, place),),
                            ((expert, place),),
                        )

    def _replacements(self, busiest: int, mine: Sequence[int]) -> Iterator[_Idea]:
        """The busiest rank drops a copy that is not needed, for one more of an expert with less load a copy."""
        surplus = [expert for expert in mine if self.can_spare(expert, busiest)]
        for expert in surplus[:REPLACED]:
            alone = self.loads[expert] / (len(self.where[expert]) - 1)
            heir, least = self._heir(expert, busiest, alone)
            most = self.busy[busiest] - least
            yield min(self.share[expert], most), True, ((expert, busiest),), ()
            for share, other in self._light[:REPLACED]:
                if self.fits(other, busiest):
                    eased = self.share[expert] - share
                    sure = eased <= most or heir not in self.where[other]
                    yield min(eased, most) if sure else eased, sure, ((expert, busiest),), ((other, busiest),)

    def _heir(self, expert: int, giver: int, share: float) -> tuple[int, float]:
        """Who is busiest of those that hold the expert still when `giver` has dropped it, and a copy's load is `share`.

        And that rank's load then, unless another change takes some of it.
        """
        heir = max(self.where[expert] - {giver}, key=self.busy.__getitem__)
        return heir, self.busy[heir] - self.share[expert] + share

    def _peak_after(self, drop: _Places, add: _Places) -> float:
        """The load of the busiest of the ranks that dropping and adding these copies changes."""
        holders: dict[int, set[int]] = {}
        for expert, rank in drop:
            holders.setdefault(expert, set(self.where[expert])).discard(rank)
        for expert, rank in add:
            holders.setdefault(expert, set(self.where[expert])).add(rank)
        after: dict[int, float] = {}
        for expert, ranks in holders.items():
            old, share = self.share[expert], self.loads[expert] / len(ranks)
            for rank in self.where[expert]:
                after[rank] = after.get(rank, self.busy[rank]) - old
            for rank in ranks:
                after[rank] = after.get(rank, self.busy[rank]) + share
        return max(after.values())


def _take_out(ordered: list[tuple[float, int]], entry: tuple[float, int]) -> None:
    """If it is there."""
    place = bisect_left(ordered, entry)
    if place < len(ordered) and ordered[place] == entry:
        del ordered[place]
