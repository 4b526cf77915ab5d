"""Which rank holds which experts of one layer, and the changes that make it tolerant, then even."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

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


class Edit(NamedTuple):
    """Copies to drop and to add, (expert, rank) each."""

    drop: tuple[tuple[int, int], ...]
    add: tuple[tuple[int, int], ...]


class Board:
    """`room[rank]` slots. `least` copies of every expert are what slots allow."""

    def __init__(self, loads: Sequence[float], room: Sequence[int]) -> None:
        self.loads = loads
        self.total = sum(loads)
        self.room = list(room)
        ranks = len(room)
        self.least = max(1, min(ranks, sum(room) // len(loads)))
        self.holds: list[set[int]] = [set() for _ in range(ranks)]
        self.where: list[set[int]] = [set() for _ in loads]
        self.busy = [0.0] * ranks
        """Expected load of each rank."""

    @property
    def imbalance(self) -> float:
        return imbalance_of(self.busy)

    def copy(self) -> Board:
        other = Board(self.loads, self.room)
        other.holds = [set(experts) for experts in self.holds]
        other.where = [set(ranks) for ranks in self.where]
        other.busy = list(self.busy)
        return other

    def moves_to(self, other: Board) -> int:
        """How many experts come to ranks that do not hold them here."""
        return sum(len(new - old) for new, old in zip(other.holds, self.holds, strict=True))

    def has_room(self, rank: int) -> bool:
        return len(self.holds[rank]) < self.room[rank]

    def place(self, expert: int, rank: int) -> None:
        """`add` without the loads; `count_loads` then."""
        self.holds[rank].add(expert)
        self.where[expert].add(rank)

    def count_loads(self) -> None:
        self.busy = [
            sum(self.loads[expert] / len(self.where[expert]) for expert in sorted(experts))
            for experts in self.holds
        ]

    def add(self, expert: int, rank: int) -> None:
        self._recount(expert, self.where[expert] | {rank})
        self.holds[rank].add(expert)

    def drop(self, expert: int, rank: int) -> None:
        self._recount(expert, self.where[expert] - {rank})
        self.holds[rank].discard(expert)

    def _recount(self, expert: int, ranks: set[int]) -> None:
        for rank in self.where[expert]:
            self.busy[rank] -= self.loads[expert] / len(self.where[expert])
        for rank in ranks:
            self.busy[rank] += self.loads[expert] / len(ranks)
        self.where[expert] = ranks

    # Tolerance

    def restore(self) -> None:
        """Give every expert `least` copies where they can be had, and no rank more than it has room for."""
        for rank in range(len(self.room)):
            while len(self.holds[rank]) > self.room[rank] and self._make_way(rank):
                pass
        needy = [expert for expert, ranks in enumerate(self.where) if len(ranks) < self.least]
        for expert in sorted(
            needy, key=lambda expert: (len(self.where[expert]), -self.loads[expert], expert)
        ):
            while len(self.where[expert]) < self.least and self._provide(expert):
                pass

    def _make_way(self, rank: int) -> bool:
        """Drop what is most easily missed, or move it to a rank with room."""
        surplus = [e for e in self.holds[rank] if len(self.where[e]) > self.least]
        if surplus:
            self.drop(min(surplus, key=lambda e: (self.loads[e] / len(self.where[e]), e)), rank)
            return True
        for expert in sorted(self.holds[rank]):
            for taker in self._with_room():
                if self.fits(expert, taker):
                    self.apply(_exchange(expert, rank, NOBODY, taker))
                    return True
        return False

    def _provide(self, expert: int) -> bool:
        """One more copy: into a free slot, in place of a copy that is not needed, or of one that finds another place."""
        edit = next(self._ways_in(expert), None)
        if edit is None:
            return False
        self.apply(edit)
        return True

    def _ways_in(self, expert: int) -> Iterator[Edit]:
        by_load = sorted(range(len(self.room)), key=lambda rank: (self.busy[rank], rank))
        takers = [rank for rank in by_load if self.fits(expert, rank)]
        for rank in takers:
            if self.has_room(rank):
                yield Edit((), ((expert, rank),))
        for rank in takers:
            for other in sorted(self.holds[rank]):
                if len(self.where[other]) > self.least:
                    yield Edit(((other, rank),), ((expert, rank),))
        for rank in takers:
            for other in sorted(self.holds[rank]):
                for second in self._with_room():
                    if self.fits(other, second):
                        yield Edit(((other, rank),), ((other, second), (expert, rank)))

    def _with_room(self) -> list[int]:
        free = [rank for rank, held in enumerate(self.holds) if len(held) < self.room[rank]]
        return sorted(free, key=lambda rank: (self.busy[rank], rank))

    def fits(self, expert: int, rank: int) -> bool:
        """Whether `rank` may get a copy."""
        return rank not in self.where[expert]

    def apply(self, edit: Edit) -> None:
        for expert, rank in edit.drop:
            self.drop(expert, rank)
        for expert, rank in edit.add:
            self.add(expert, rank)

    # Balance

    def balance(self, goal: float, max_moves: int, max_edits: int) -> None:
        """Make the busiest rank less busy until max/mean is at `goal`, moving at most so many experts."""
        mean = self.total / len(self.room)
        for _ in range(max_edits):
            if max(self.busy) <= goal * mean:
                return
            edit = self._best_edit(goal * mean, mean * NEGLIGIBLE, max_moves)
            if edit is None:
                return
            self.apply(edit)
            max_moves -= len(edit.add)

    def _best_edit(self, goal: float, negligible: float, max_moves: int) -> Edit | None:
        """What takes most load off the busiest rank for each expert moved, making no other as busy."""
        peak = max(self.busy)
        busiest = self.busy.index(peak)
        mine = sorted(self.holds[busiest], key=lambda e: (-self.share(e), e))
        takers = self._least_busy(busiest)
        best, most = self._best_exchange(busiest, mine, takers, negligible)
        if best is not None and len(best.add) <= max_moves and most * len(best.add) >= (peak - goal) / 2:
            return best
        if best is not None and len(best.add) > max_moves:
            best, most = None, negligible
        for edit in (*self._replications(mine, takers), *self._replacements(busiest, mine)):
            gain = (peak - self._peak_after(edit)) / max(1, len(edit.add))
            if gain > most and len(edit.add) <= max_moves:
                best, most = edit, gain
        return best

    def share(self, expert: int) -> float:
        """The load of one copy."""
        return self.loads[expert] / len(self.where[expert])

    def _least_busy(self, busiest: int) -> list[int]:
        ranks = sorted(range(len(self.room)), key=self.busy.__getitem__)
        return [rank for rank in ranks[:CANDIDATES] if rank != busiest]

    def _best_exchange(
        self, busiest: int, mine: Sequence[int], takers: Sequence[int], negligible: float
    ) -> tuple[Edit | None, float]:
        """The busiest rank hands an expert over, for a slot or for one with less load. As many copies as before."""
        best, most = None, negligible
        peak = self.busy[busiest]
        shares = [(self.share(expert), expert) for expert in mine]
        for taker in takers:
            busy = self.busy[taker]
            others: list[tuple[float, int]] = [(self.share(e), e) for e in sorted(self.holds[taker])]
            if self.has_room(taker):
                others.append((0.0, NOBODY))
            for theirs, other in others:
                cost = 1 if other == NOBODY else 2
                for ours, expert in shares:
                    shift = ours - theirs
                    gain = min(shift, peak - busy - shift) / cost
                    if gain > most and self._exchangeable(expert, busiest, other, taker):
                        most = gain
                        best = _exchange(expert, busiest, other, taker)
        return best, most

    def _exchangeable(self, expert: int, busiest: int, other: int, taker: int) -> bool:
        return self.fits(expert, taker) and (other == NOBODY or self.fits(other, busiest))

    def _replications(self, mine: Sequence[int], takers: Sequence[int]) -> Iterator[Edit]:
        """One more copy of what the busiest rank holds: in a free slot, or in place of one that others miss least."""
        for taker in takers:
            if self.has_room(taker):
                for expert in mine:
                    if self.fits(expert, taker):
                        yield Edit((), ((expert, taker),))
        surplus = [e for e, ranks in enumerate(self.where) if len(ranks) > self.least]
        surplus.sort(key=lambda e: (self.loads[e] / (len(self.where[e]) - 1), e))
        for other in surplus[:REPLACED]:
            for place in sorted(self.where[other], key=lambda rank: (self.busy[rank], rank))[:REPLACED]:
                for expert in mine[:REPLACED]:
                    if expert != other and self.fits(expert, place):
                        yield Edit(((other, place),), ((expert, place),))

    def _replacements(self, busiest: int, mine: Sequence[int]) -> Iterator[Edit]:
        """The busiest rank drops a copy that is not needed, for one more of an expert with less load a copy."""
        surplus = [expert for expert in mine if len(self.where[expert]) > self.least]
        if not surplus:
            return
        share = {e: self.loads[e] / (len(self.where[e]) + 1) for e in range(len(self.loads))}
        lightest = sorted(share, key=lambda e: (share[e], e))[:REPLACED]
        for expert in surplus[:REPLACED]:
            yield Edit(((expert, busiest),), ())
            for other in lightest:
                if self.fits(other, busiest):
                    yield Edit(((expert, busiest),), ((other, busiest),))

    def _peak_after(self, edit: Edit) -> float:
        """The load of the busiest of the ranks that `edit` changes."""
        holders: dict[int, set[int]] = {}
        for expert, rank in edit.drop:
            holders.setdefault(expert, set(self.where[expert])).discard(rank)
        for expert, rank in edit.add:
            holders.setdefault(expert, set(self.where[expert])).add(rank)
        after: dict[int, float] = {}
        for expert, ranks in holders.items():
            load, old = self.loads[expert], self.where[expert]
            for rank in old:
                after[rank] = after.get(rank, self.busy[rank]) - load / len(old)
            for rank in ranks:
                after[rank] = after.get(rank, self.busy[rank]) + load / len(ranks)
        return max(after.values())


def _exchange(expert: int, busiest: int, other: int, taker: int) -> Edit:
    if other == NOBODY:
        return Edit(((expert, busiest),), ((expert, taker),))
    return Edit(((expert, busiest), (other, taker)), ((expert, taker), (other, busiest)))
