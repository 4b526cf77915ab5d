"""Which slot to fill or to empty next, in one layer: first so that tolerance comes back, then so that a plan comes true.

Nothing here empties a slot whose expert would then have fewer living copies than wanted.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain

from elastic_ep.placement import EMPTY, Change, Placement


@dataclass
class Layer:
    """One layer as the living see it. `wanted`: copies that every expert should have.

    `coming` maps a slot to the expert that is being copied into it; `given_up` are such slots whose copy is overdue;
    `closed` are empty slots that must wait before they are tried again.
    """

    placement: Placement
    number: int
    ranks: Collection[int]
    wanted: int
    coming: Mapping[int, int]
    given_up: Collection[int]
    closed: Collection[int]
    living: list[int] = field(init=False)
    """Copies of each expert on living ranks."""

    def __post_init__(self) -> None:
        self.row = list(self.placement.slots[self.number])
        self.living = self.placement.copies(self.number, self.ranks)
        self.taken: dict[int, int] = dict(self.coming)
        width = self.placement.slots_per_rank
        ranks = sorted(self.ranks)
        self.slots = [rank * width + slot for slot in range(width) for rank in ranks]
        """Those of living ranks; one rank after the other, so that the load spreads."""
        self.here = {rank: set(self.row[rank * width : (rank + 1) * width]) - {EMPTY} for rank in ranks}
        """By rank, the experts that it holds or is being given."""
        for slot, expert in self.taken.items():
            self.here[self.placement.rank_of(slot)].add(expert)
        self._place = {slot: place for place, slot in enumerate(self.slots)}
        self._empty = dict.fromkeys(filter(self._is_free, self.slots))
        """Slots to fill, in the order of `slots`."""
        self._holders: dict[int, list[int]] = {}
        """By expert, the places in `slots` of those that hold it."""
        for place, slot in enumerate(self.slots):
            self._holders.setdefault(self.row[slot], []).append(place)
        self._surplus = sorted(
            (-self.living[expert], place)
            for expert, places in self._holders.items()
            if expert != EMPTY and self.living[expert] > self.wanted
            for place in places
        )
        """(minus the copies of its expert, place) of each slot whose expert has more copies than wanted: most first."""

    # Tolerance

    def restore(self) -> Iterator[Change]:
        """Give each expert that lacks copies an empty slot, the neediest first; empty one if there is none."""
        coming = {expert for slot, expert in self.coming.items() if slot not in self.given_up}
        needy = [e for e, n in enumerate(self.living) if n < self.wanted and e not in coming]
        for expert in sorted(needy, key=lambda expert: (self.living[expert], expert)):
            found = self._slot_for(expert)
            if found is not None:
                yield from self._use(*found)

    def _slot_for(self, expert: int) -> tuple[int, int] | None:
        """A slot to use and what to put there: the expert itself, or one that makes way for it where it fits."""
        direct = next((slot for slot in self._usable() if self._fits(slot, expert)), None)
        if direct is not None:
            return direct, expert
        if any(self.living[logical] >= self.wanted for logical in self.coming.values()):
            return None  # somebody is making way already
        for slot in self._usable():
            for other in self._in_the_way(expert):
                if self._fits(slot, other):
                    return slot, other
        return None

    def _in_the_way(self, expert: int) -> Iterator[int]:
        """Experts on ranks that could take `expert`. With one more copy elsewhere, such a one is surplus there."""
        for slot in self.slots:
            if self.row[slot] != EMPTY and self._fits(slot, expert):
                yield self.row[slot]

    # A plan

    def pursue(self, plan: Mapping[int, frozenset[int]]) -> Iterator[Change]:
        """`plan`: the experts that each rank should hold. To be asked after `restore`, as far as one likes to go."""
        for rank, experts in plan.items():
            yield from self._pursue(rank, experts)

    def _pursue(self, rank: int, experts: frozenset[int]) -> Iterator[Change]:
        """Empty what the plan does not want here and others have enough of; fill what it wants."""
        width = self.placement.slots_per_rank
        slots = range(rank * width, (rank + 1) * width)
        for slot in slots:
            held = self.row[slot]
            if held != EMPTY and held not in experts and self.living[held] > self.wanted:
                yield self._empty_out(slot)
        here = self.here[rank]
        free = [slot for slot in slots if self._is_free(slot)]
        for expert, slot in zip(
            sorted(experts - here, key=lambda e: (self.living[e], e)), free, strict=False
        ):
            yield from self._use(slot, expert)

    # Slots

    def _use(self, slot: int, logical: int) -> Iterator[Change]:
        if self.row[slot] != EMPTY:
            yield self._empty_out(slot)
        self.taken[slot] = logical
        self._empty.pop(slot, None)
        self.here[self.placement.rank_of(slot)].add(logical)
        yield Change(self.number, slot, logical)

    def _empty_out(self, slot: int) -> Change:
        expert = self.row[slot]
        copies, places = self.living[expert], self._holders[expert]
        if copies > self.wanted:
            for place in places:
                del self._surplus[bisect_left(self._surplus, (-copies, place))]
        places.remove(self._place[slot])
        self.living[expert] = copies - 1
        if copies - 1 > self.wanted:
            for place in places:
                insort(self._surplus, (1 - copies, place))
        self.here[self.placement.rank_of(slot)].discard(expert)
        self.row[slot] = EMPTY
        return Change(self.number, slot, EMPTY)

    def _is_free(self, slot: int) -> bool:
        return self.row[slot] == EMPTY and slot not in self.taken and slot not in self.closed

    def _usable(self) -> Iterator[int]:
        """Empty slots, then those whose expert has more copies than wanted, the one with most first."""
        return chain(self._empty, (self.slots[place] for _, place in self._surplus))

    def _fits(self, slot: int, expert: int) -> bool:
        """Whether the slot's rank has no copy of the expert yet, nor one in the making."""
        return expert not in self.here[self.placement.rank_of(slot)]
