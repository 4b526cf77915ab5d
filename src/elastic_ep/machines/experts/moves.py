"""Which slot to fill or to empty next, in one layer: first so that tolerance comes back, then so that a plan comes true.

Nothing here empties a slot whose expert would then have fewer living copies than wanted, or be on fewer hosts, but for
one slot at a time, where without it no expert could come to another host: of a copy that shares its host with another.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import chain

from elastic_ep.placement import EMPTY, Change, Placement


class _Held(dict[int, set[int]]):
    """By rank, the experts in its slots of `row`, which is looked at when somebody asks."""

    def __init__(self, row: list[int], width: int) -> None:
        super().__init__()
        self._row, self._width = row, width

    def __missing__(self, rank: int) -> set[int]:
        self[rank] = held = set(self._row[rank * self._width : (rank + 1) * self._width]) - {EMPTY}
        return held


@dataclass
class Layer:
    """One layer as the living see it. `wanted`: copies that every expert should have, `spread`: hosts that they are on.

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
    spread: int = 1
    living: list[int] = field(init=False)
    """Copies of each expert on living ranks."""

    def __post_init__(self) -> None:
        """HAZARD: this is done for every copy, of layers with a thousand slots: so it looks at each of them once."""
        self.row = row = list(self.placement.slots[self.number])
        self.taken: dict[int, int] = dict(self.coming)
        width = self.placement.slots_per_rank
        ranks = sorted(self.ranks)
        self.slots = [rank * width + slot for slot in range(width) for rank in ranks]
        """Those of living ranks; one rank after the other, so that the load spreads."""
        self.here = _Held(row, width)
        """By rank, the experts that it holds or is being given."""
        for slot, expert in self.taken.items():
            self.here[self.placement.rank_of(slot)].add(expert)
        self._host_of = [self.placement.host_of(rank) for rank in range(self.placement.num_ranks)]
        self._place = dict(zip(self.slots, range(len(self.slots)), strict=True))
        self._empty: dict[int, None] = {}
        """Slots to fill, in the order of `slots`."""
        self._holders: list[list[int]] = [[] for _ in range(self.placement.num_experts)]
        """By expert, the places in `slots` of those that hold it."""
        self._on_host: list[dict[int, int]] = [{} for _ in self._holders]
        """By expert, how many copies each host has; those that are being made are not among them."""
        for place, slot in enumerate(self.slots):
            expert = row[slot]
            if expert != EMPTY:
                self._holders[expert].append(place)
                on, host = self._on_host[expert], self._host_of[slot // width]
                on[host] = on.get(host, 0) + 1
            elif self._is_free(slot):
                self._empty[slot] = None
        self.living = list(map(len, self._holders))
        self._surplus = sorted(
            (-len(places), place) for places in self._holders if len(places) > self.wanted for place in places
        )
        """(minus the copies of its expert, place) of each slot whose expert has more copies than wanted: most first."""

    # Tolerance

    def restore(self) -> Iterator[Change]:
        """Give each expert that lacks copies, or hosts, an empty slot, the neediest first; empty one if there is none."""
        coming = {expert for slot, expert in self.coming.items() if slot not in self.given_up}
        needy = [
            e
            for e, n in enumerate(self.living)
            if (n < self.wanted or len(self._on_host[e]) < self.spread) and e not in coming
        ]
        for expert in sorted(needy, key=lambda expert: (self.living[expert], expert)):
            found = self._slot_for(expert)
            if found is not None:
                yield from self._use(*found)
        if self.spread > 1 and not (self.taken or self.closed):
            yield from self._make_room(needy)

    def _slot_for(self, expert: int) -> tuple[int, int] | None:
        """A slot to use and what to put there: the expert itself, or one that makes way for it where it fits.

        On a host without a copy, if there should be one more; on any, if copies are lacking and that cannot be had.
        """
        apart = len(self._on_host[expert]) < self.spread
        direct = next((slot for slot in self._usable() if self._suits(slot, expert, apart)), None)
        if direct is not None:
            return direct, expert
        if any(self.living[logical] >= self.wanted for logical in self.coming.values()):
            return None  # somebody is making way already
        for slot in self._usable():
            for place, other in self._in_the_way(expert, apart):
                if self._fits(slot, other) and self._keeps_apart(other, place, slot):
                    return slot, other
        if not apart or self.living[expert] >= self.wanted:
            return None
        return next(((slot, expert) for slot in self._usable() if self._fits(slot, expert)), None)

    def _make_room(self, needy: Iterable[int]) -> Iterator[Change]:
        """All slots are needed: give up a copy that shares its host, for one that makes way for it on another host."""
        for expert in needy:
            on = self._on_host[expert]
            if self.living[expert] != self.wanted or len(on) >= self.spread:
                continue
            for slot in [self.slots[place] for place in self._holders[expert]]:
                ways = self._in_the_way(expert, apart=True) if on[self._host(slot)] > 1 else ()
                if any(self._fits(slot, x) and self._keeps_apart(x, place, slot) for place, x in ways):
                    yield self._empty_out(slot)
                    return

    def _in_the_way(self, expert: int, apart: bool) -> Iterator[tuple[int, int]]:
        """Slots that could take `expert`, and what they hold. With one more copy elsewhere, that is surplus there."""
        for slot in self.slots:
            if self.row[slot] != EMPTY and self._suits(slot, expert, apart):
                yield slot, self.row[slot]

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
            if held != EMPTY and held not in experts and self._spared(slot):
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
        on, host = self._on_host[expert], self._host(slot)
        on[host] -= 1
        if not on[host]:
            del on[host]
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
        surplus = (self.slots[place] for _, place in self._surplus)
        return chain(self._empty, surplus if self.spread == 1 else filter(self._spared, surplus))

    def _spared(self, slot: int) -> bool:
        """Whether the slot's expert has a copy and a host more than it should."""
        expert = self.row[slot]
        if self.living[expert] <= self.wanted:
            return False
        on = self._on_host[expert]
        return len(on) > self.spread or on[self._host(slot)] > 1

    def _suits(self, slot: int, expert: int, apart: bool) -> bool:
        """Whether a copy there is one more, and if it should be `apart`, on one more host."""
        return self._fits(slot, expert) and not (apart and self._host(slot) in self._on_host[expert])

    def _keeps_apart(self, expert: int, giver: int, taker: int) -> bool:
        """Whether the expert is on as many hosts as it should be, or is now, after going from one slot to the other."""
        if self.spread == 1:
            return True
        on, left, entered = self._on_host[expert], self._host(giver), self._host(taker)
        lost = on[left] == 1 and entered != left
        return len(on) - lost + (entered not in on) >= min(self.spread, len(on))

    def _fits(self, slot: int, expert: int) -> bool:
        """Whether the slot's rank has no copy of the expert yet, nor one in the making."""
        return expert not in self.here[self.placement.rank_of(slot)]

    def _host(self, slot: int) -> int:
        return self._host_of[self.placement.rank_of(slot)]
