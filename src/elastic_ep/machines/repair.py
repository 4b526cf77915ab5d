"""The repair machine: after a loss it has copies re-made on survivors, until what can be tolerated is back.

Placement is read-copy-update. A slot is filled only when no member can still address it: it was empty in a version
that every member has seen. Only when the bytes are there and their checksum is right is a placement published that
names it. A slot with a copy that nobody needs is emptied first, which is a version like any other.

The rows of a dead rank stay as they are: its next incarnation loads what they say, and so has its share at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from elastic_ep.machines import repair_events as ev
from elastic_ep.machines.contract import Tick
from elastic_ep.machines.repair_events import Effect, Event, RepairConfig
from elastic_ep.messages import CopySlot, Member, PlacementChanged
from elastic_ep.placement import EMPTY, Change, Placement

Place = tuple[int, int]
"""(layer, physical expert)"""


@dataclass(frozen=True)
class Copy:
    """A copy in the making."""

    ticket: int
    member: Member
    logical: int
    deadline_ms: int
    overdue: bool = False
    """Its outcome no longer counts, but its slot may be written to until it is reported."""


@dataclass
class RepairMachine:
    """Feed it with `step`; `placement` may be read."""

    placement: Placement
    config: RepairConfig = field(default_factory=RepairConfig)

    def __post_init__(self) -> None:
        self.members: frozenset[Member] = frozenset()
        self.seen: dict[Member, int] = {}
        self.emptied: dict[Place, int] = {}
        """The version that emptied a slot; empty since the launch: none."""
        self.copies: dict[Place, Copy] = {}
        self.retry_at_ms: dict[Place, int] = {}
        self.checksums: dict[tuple[int, int], int] = {}
        """By (layer, logical expert): what its bytes amount to, wherever they lie."""
        self.now_ms = 0
        self.tickets = 0
        layers = range(len(self.placement.slots))
        ranks = range(self.placement.num_ranks)
        self.wanted = [min(self.placement.copies(layer, ranks)) for layer in layers]
        """Per layer: the copies of every expert to come back to. As many as at launch."""
        self._effects: list[Effect] = []
        self._handlers: dict[type, Callable[[Any], None]] = {
            ev.MembersChanged: self._on_members,
            ev.Seen: self._on_seen,
            ev.Copied: self._on_copied,
            ev.Summed: self._on_summed,
            Tick: self._on_tick,
        }

    def step(self, event: Event) -> list[Effect]:
        self._effects = []
        self._handlers[type(event)](event)
        for layer in range(len(self.placement.slots)):
            self._repair(layer)
        return self._effects

    def check(self) -> None:
        for (layer, physical), copy in self.copies.items():
            assert self.placement.slots[layer][physical] == EMPTY, (
                "a slot that is addressed is being overwritten"
            )
            assert copy.member in self.members, "a copy on a rank that is gone"
            assert self._unaddressed((layer, physical)), (
                "a member may still address the slot that is written to"
            )
        for layer, row in enumerate(self.placement.slots):
            for rank in range(self.placement.num_ranks):
                held = [expert for expert in self.placement.on_rank(layer, rank) if expert != EMPTY]
                assert len(held) == len(set(held)), f"layer {layer}: two copies of an expert on rank {rank}"
            assert len(row) == self.placement.num_ranks * self.placement.slots_per_rank

    def next_deadline_ms(self) -> int | None:
        times = [copy.deadline_ms for copy in self.copies.values() if not copy.overdue]
        return min([*times, *self.retry_at_ms.values()], default=None)

    def _on_members(self, event: ev.MembersChanged) -> None:
        """A new member has heard every version published before the view that seats it: they share one ordered wire."""
        self.members = frozenset(event.members)
        self.seen = {member: self.seen.get(member, self.placement.version) for member in self.members}
        self.copies = {place: copy for place, copy in self.copies.items() if copy.member in self.members}

    def _on_seen(self, event: ev.Seen) -> None:
        if event.member in self.members:
            self.seen[event.member] = max(self.seen[event.member], event.version)

    def _on_copied(self, event: ev.Copied) -> None:
        place = next((place for place, copy in self.copies.items() if copy.ticket == event.ticket), None)
        if place is None or self.copies[place].member != event.member:
            return
        copy = self.copies.pop(place)
        expected = self.checksums.setdefault((place[0], copy.logical), event.checksum)
        if copy.overdue or event.error or event.checksum != expected:
            self.retry_at_ms[place] = self.now_ms + self.config.retry_ms
            return
        self._publish(Change(*place, copy.logical))

    def _on_summed(self, event: ev.Summed) -> None:
        """The first sum of an expert is believed; a copy that differs from it later is taken out and made anew."""
        if event.member not in self.members:
            return
        for layer, physical, checksum in event.sums:
            logical = self.placement.slots[layer][physical]
            if self.placement.rank_of(physical) != event.member.rank or logical == EMPTY:
                continue
            if self.checksums.setdefault((layer, logical), checksum) != checksum:
                self._effects.append(ev.Corrupt(layer, physical))
                self._publish(Change(layer, physical, EMPTY))

    def _on_tick(self, event: Tick) -> None:
        self.now_ms = max(self.now_ms, event.now_ms)
        self.retry_at_ms = {place: at for place, at in self.retry_at_ms.items() if at > self.now_ms}
        for place, copy in self.copies.items():
            if self.now_ms >= copy.deadline_ms and not copy.overdue:
                self.copies[place] = Copy(
                    copy.ticket, copy.member, copy.logical, copy.deadline_ms, overdue=True
                )

    # Repair

    def _repair(self, layer: int) -> None:
        """Give each expert that lacks copies an empty slot, the neediest first; empty one if there is none."""
        ranks = {member.rank for member in self.members}
        if not ranks:
            return
        room = len(ranks) * self.placement.slots_per_rank // self.placement.num_experts
        target = min(self.wanted[layer], max(1, room))
        living = self.placement.copies(layer, ranks)
        coming = {copy.logical for (at, _), copy in self.copies.items() if at == layer and not copy.overdue}
        needy = [e for e in range(self.placement.num_experts) if living[e] < target and e not in coming]
        taken: set[int] = set()
        for expert in sorted(needy, key=lambda expert: (living[expert], expert)):
            found = self._place_for(layer, expert, living, target, taken)
            if found is None:
                continue
            place, logical = found
            held = self.placement.slots[layer][place]
            if held != EMPTY:
                living[held] -= 1
                self._publish(Change(layer, place, EMPTY))
            taken.add(place)
            self._fill(layer, place, logical)

    def _place_for(
        self, layer: int, expert: int, living: list[int], target: int, taken: set[int]
    ) -> tuple[int, int] | None:
        """A slot to use and what to put there: the expert itself, or one that makes way for it where it fits."""
        usable = [place for place in self._empty_slots(layer) if place not in taken]
        usable += self._surplus_slots(layer, living, target)
        direct = next((place for place in usable if self._fits(layer, place, expert)), None)
        if direct is not None:
            return direct, expert
        if any(at == layer and living[copy.logical] >= target for (at, _), copy in self.copies.items()):
            return None  # somebody is making way already
        for place in usable:
            for other in self._in_the_way(layer, expert):
                if self._fits(layer, place, other):
                    return place, other
        return None

    def _in_the_way(self, layer: int, expert: int) -> Iterator[int]:
        """Experts on ranks that could take `expert`. With one more copy elsewhere, such a one is surplus there."""
        for physical, held in self._living_slots(layer):
            if held != EMPTY and self._fits(layer, physical, expert):
                yield held

    def _fill(self, layer: int, physical: int, logical: int) -> None:
        """Order the copy, unless the slot may still be addressed or its rank has enough to do: then later."""
        member = self._member_at(physical)
        busy = sum(copy.member == member for copy in self.copies.values())
        if busy >= self.config.copies_in_flight or not self._unaddressed((layer, physical)):
            return
        self.tickets += 1
        deadline_ms = self.now_ms + self.config.copy_deadline_ms
        self.copies[layer, physical] = Copy(self.tickets, member, logical, deadline_ms)
        self._effects.append(ev.Order(member, CopySlot(self.tickets, layer, physical, logical)))

    def _publish(self, change: Change) -> None:
        version = self.placement.version + 1
        self.placement = self.placement.changed(version, [change])
        if change.logical == EMPTY:
            self.emptied[change.layer, change.physical] = version
        self._effects.append(ev.Replace(PlacementChanged(version, (change,))))

    # Reading

    def _member_at(self, physical: int) -> Member:
        rank = self.placement.rank_of(physical)
        return next(member for member in self.members if member.rank == rank)

    def _unaddressed(self, place: Place) -> bool:
        emptied = self.emptied.get(place, -1)
        return all(seen >= emptied for seen in self.seen.values())

    def _living_slots(self, layer: int) -> Iterator[tuple[int, int]]:
        """(physical, logical) on members; one rank after the other, so that the load spreads."""
        width = self.placement.slots_per_rank
        ranks = sorted(member.rank for member in self.members)
        for slot in range(width):
            for rank in ranks:
                physical = rank * width + slot
                yield physical, self.placement.slots[layer][physical]

    def _empty_slots(self, layer: int) -> list[int]:
        free = []
        for physical, logical in self._living_slots(layer):
            place = (layer, physical)
            if logical == EMPTY and place not in self.copies and place not in self.retry_at_ms:
                free.append(physical)
        return free

    def _surplus_slots(self, layer: int, living: list[int], target: int) -> list[int]:
        """Slots whose expert has more copies than wanted, the one with most first."""
        slots = [
            (living[held], physical)
            for physical, held in self._living_slots(layer)
            if held != EMPTY and living[held] > target
        ]
        return [physical for _, physical in sorted(slots, key=lambda slot: -slot[0])]

    def _fits(self, layer: int, physical: int, expert: int) -> bool:
        """Whether the slot's rank has no copy of the expert yet, nor one in the making."""
        rank = self.placement.rank_of(physical)
        coming = (
            c.logical
            for (at, p), c in self.copies.items()
            if at == layer and self.placement.rank_of(p) == rank
        )
        return expert not in self.placement.on_rank(layer, rank) and expert not in coming
