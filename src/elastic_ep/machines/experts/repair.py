"""The repair machine: carries out what tolerance and plans ask for, one slot at a time, while tokens flow.

Placement is read-copy-update. A slot is filled only when no member can still address it: it was empty in a version
that every member has seen. Only when the bytes are there and their checksum is right is a placement published that
names it. A slot with a copy that nobody needs is emptied first, which is a version like any other.

The rows of a dead rank stay as they are: its next incarnation loads what they say, and so has its share at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from elastic_ep.machines.contract import Tick, UnexpectedEvent
from elastic_ep.machines.experts import events as ev
from elastic_ep.machines.experts.events import Effect, Event, Origin
from elastic_ep.machines.experts.moves import Layer
from elastic_ep.machines.machine import Machine
from elastic_ep.placement import EMPTY, Change, CopyCounts, Placement
from elastic_ep.timing import RepairConfig
from elastic_ep.wire.messages import Member, PlacementChanged

Place = tuple[int, int]
"""(layer, physical expert)"""


@dataclass(frozen=True)
class Copy:
    """A copy in the making."""

    ticket: int
    member: Member
    logical: int
    origin: Origin | None
    deadline_ms: int
    planned: bool
    """For a plan, not for tolerance."""
    overdue: bool = False
    """It is not waited for any more, but its slot may be written to until it is reported."""


@dataclass
class Pursuit:
    """A plan that is being carried out: per layer and rank the experts to hold."""

    layers: tuple[dict[int, frozenset[int]], ...]
    plan: int
    made: int = 0


@dataclass(eq=False)
class RepairMachine(Machine[Event, Effect]):
    """Feed it with `step`; `placement` may be read."""

    transient = Machine.transient | {"_copies", "_counted", "_by_rank", "_in_hand", "_versions"}
    placement: Placement
    config: RepairConfig = field(default_factory=RepairConfig)

    def __post_init__(self) -> None:
        self.members: frozenset[Member] = frozenset()
        self.leaving: frozenset[Member] = frozenset()
        self.reachable: frozenset[Member] = frozenset()
        self.seen: dict[Member, int] = {}
        self.emptied: dict[Place, int] = {}
        """The version that emptied a slot, until every member has seen it."""
        self.copies: dict[Place, Copy] = {}
        self.distrusted: dict[Place, frozenset[Member]] = {}
        """Who failed to give the bytes that a slot waits for."""
        self.retry_at_ms: dict[Place, int] = {}
        self.checksums: dict[tuple[int, int], int] = {}
        """By (layer, logical expert): what its bytes amount to, wherever they lie."""
        self.pursuit: Pursuit | None = None
        self.now_ms = 0
        self.tickets = 0
        layers = range(len(self.placement.slots))
        ranks = range(self.placement.num_ranks)
        self.wanted = [min(self.placement.copies(layer, ranks)) for layer in layers]
        """Per layer: the copies of every expert to come back to. As many as at launch."""
        self._copies = CopyCounts(self.placement)
        self._counted = (self.members, self.leaving)
        self._by_rank: dict[int, Member] = {}
        self._in_hand: Counter[Member] | None = None
        """Copies that each member makes; asked for once an event."""
        self._versions: tuple[dict[Member, int], Counter[int]] = (self.seen, Counter())
        """How many members have seen each version last, and of which `seen`. All five are reckoned from the rest."""
        self._stirred: set[int] = set()
        """Layers in which something happened that may allow or require a move, not looked at since."""
        self._refused: dict[int, set[Member]] = {}
        """By layer, the members that had too many copies in hand for one more that it needs."""
        self._unfinished: set[int] = set()
        """Layers in which the plan may ask for something yet."""
        self._effects: list[Effect] = []
        self._changes: list[Change] = []
        """What the version that this event leads to changes."""
        self._handlers: dict[type, Callable[[Any], None]] = {
            ev.MembersChanged: self._on_members,
            ev.Seen: self._on_seen,
            ev.Reachable: self._on_reachable,
            ev.Copied: self._on_copied,
            ev.Summed: self._on_summed,
            ev.Planned: self._on_planned,
            Tick: self._on_tick,
        }

    def _step(self, event: Event) -> list[Effect]:
        self._effects = []
        self._changes = []
        self._in_hand = None
        self._handlers[type(event)](event)
        if self._stirred and self.members:
            self._go_on()
            self._end_plan_if_done()
        if self._changes:  # first: the living wait for experts, and what is ordered needs no version
            self._effects.insert(
                0, ev.Replace(PlacementChanged(self.placement.version, tuple(self._changes)))
            )
        return self._effects

    def _check(self) -> None:
        for (layer, physical), copy in self.copies.items():
            assert self.placement.slots[layer][physical] == EMPTY, (
                "a slot that is addressed is being overwritten"
            )
            assert copy.member in self.members, "a copy on a rank that is gone"
            assert (layer, physical) not in self.emptied, (
                "a member may still address the slot that is written to"
            )
            assert copy.origin is None or (layer, copy.origin.physical) not in self.copies, (
                "a slot is overwritten that others read from"
            )
        for layer, row in enumerate(self.placement.slots):
            for rank in range(self.placement.num_ranks):
                held = [expert for expert in self.placement.on_rank(layer, rank) if expert != EMPTY]
                assert len(held) == len(set(held)), f"layer {layer}: two copies of an expert on rank {rank}"
            assert len(row) == self.placement.num_ranks * self.placement.slots_per_rank

    def next_deadline_ms(self) -> int | None:
        if self._stirred and self.members:
            return self.now_ms
        times = [copy.deadline_ms for copy in self.copies.values() if not copy.overdue]
        return min([*times, *self.retry_at_ms.values()], default=None)

    @property
    def staying(self) -> frozenset[Member]:
        """Where copies count. Those that leave are read from all the same."""
        return self.members - self.leaving

    def floor(self, layer: int) -> int:
        """Copies that every expert of the layer should have, as the slots of the living allow."""
        room = (
            (len(self.members) - len(self.leaving))
            * self.placement.slots_per_rank
            // self.placement.num_experts
        )
        return min(self.wanted[layer], max(1, room))

    def spread(self, layer: int) -> int:
        """Hosts that every expert of the layer should be on, as the slots of the living allow."""
        return self.counts().spread(self.floor(layer))

    # Events

    def _on_members(self, event: ev.MembersChanged) -> None:
        """A new member has heard every version published before the view that seats it: they share one ordered wire."""
        self.reachable -= self.members - frozenset(event.members)
        self.members = frozenset(event.members)
        leaving = self.members & frozenset(event.leaving)
        self.leaving = leaving if leaving < self.members else frozenset()
        self.seen = {member: self.seen.get(member, self.placement.version) for member in self.members}
        self.copies = {place: copy for place, copy in self.copies.items() if copy.member in self.members}
        self.distrusted.clear()
        self._forget_emptied()
        self._drop_plan()
        self._stir_all()

    def _on_seen(self, event: ev.Seen) -> None:
        if event.version > self.placement.version:
            raise UnexpectedEvent(f"has seen version {event.version} of the placement, which does not exist")
        if event.member not in self.members or event.version <= (before := self.seen[event.member]):
            return
        versions = self._seen_versions()
        self.seen[event.member] = event.version
        versions[before] -= 1
        versions[event.version] += 1
        if not versions[before]:
            del versions[before]
            self._forget_emptied()

    def _seen_versions(self) -> Counter[int]:
        """HAZARD: every member says of every version that it has seen it: that must not take a look at all members."""
        counted, versions = self._versions
        if counted is not self.seen:
            versions = Counter(self.seen.values())
            self._versions = (self.seen, versions)
        return versions

    def _on_reachable(self, event: ev.Reachable) -> None:
        """It may come before the view that seats the member, and is of no use until then."""
        self.reachable |= {event.member}

    def _on_copied(self, event: ev.Copied) -> None:
        place = next((place for place, copy in self.copies.items() if copy.ticket == event.ticket), None)
        if place is None or self.copies[place].member != event.member:
            return
        copy = self.copies.pop(place)
        layer, physical = place
        self._stirred.add(layer)
        expected = (
            event.checksum
            if event.error
            else self.checksums.setdefault((layer, copy.logical), event.checksum)
        )
        if event.error or event.checksum != expected:
            self._copy_failed(place, copy, wrong=not event.error and event.checksum != expected)
            return
        self.distrusted.pop(place, None)
        if self.pursuit and copy.logical in self.pursuit.layers[layer].get(event.member.rank, ()):
            self.pursuit.made += 1
        self._publish(Change(layer, physical, copy.logical))

    def _copy_failed(self, place: Place, copy: Copy, *, wrong: bool) -> None:
        """Another source at once; after the checkpoint, the last of them, again from the first after a while."""
        if copy.origin is None:
            self.distrusted.pop(place, None)
            self.retry_at_ms[place] = self.now_ms + self.config.retry_ms
            return
        self.distrusted[place] = self.distrusted.get(place, frozenset()) | {copy.origin.member}
        if wrong and copy.origin.member in self.members:
            self._effects.append(ev.Recheck(copy.origin.member))

    def _on_summed(self, event: ev.Summed) -> None:
        """The first sum of an expert is believed; a copy that differs from it later is taken out and made anew."""
        width = self.placement.slots_per_rank
        own = range(event.member.rank * width, (event.member.rank + 1) * width)
        if any(s[0] not in range(len(self.placement.slots)) or s[1] not in own for s in event.sums):
            raise UnexpectedEvent("sums of slots that it has not")
        if event.member not in self.members:
            return
        for layer, physical, checksum in event.sums:
            logical = self.placement.slots[layer][physical]
            if logical == EMPTY:
                continue
            if self.checksums.setdefault((layer, logical), checksum) != checksum:
                self._effects.append(ev.Corrupt(layer, physical))
                self._publish(Change(layer, physical, EMPTY))
                self._stirred.add(layer)

    def _on_planned(self, event: ev.Planned) -> None:
        """A plan made for other members than there are now, or are to stay, is of no use."""
        self._drop_plan()
        if not self.members or self.leaving or frozenset(event.members) != self.members:
            self._effects.append(ev.PlanEnded(0, 0, event.plan))
            return
        width = self.placement.slots_per_rank
        ranks = sorted(member.rank for member in self.members)
        self.pursuit = Pursuit(
            tuple(
                {rank: frozenset(row[rank * width : (rank + 1) * width]) - {EMPTY} for rank in ranks}
                for row in event.slots
            ),
            event.plan,
        )
        self._stir_all()

    def _on_tick(self, event: Tick) -> None:
        self.now_ms = max(self.now_ms, event.now_ms)
        due = [place for place, at in self.retry_at_ms.items() if at <= self.now_ms]
        late = [place for place, c in self.copies.items() if self.now_ms >= c.deadline_ms and not c.overdue]
        for place in due:
            del self.retry_at_ms[place]
        for place in late:
            self.copies[place] = replace(self.copies[place], overdue=True)
        self._stirred.update(layer for layer, _ in (*due, *late))

    # Moves

    def _stir_all(self) -> None:
        self._stirred.update(range(len(self.placement.slots)))

    def _go_on(self) -> None:
        """HAZARD: this runs for every copy. Only layers where something is possible now may be looked at, or a model of
        many layers and experts would keep the run process from everything else. What is left is for the next `Tick`.
        """
        left = self.config.layers_at_once
        if not self.pursuit:
            self._stirred -= {
                layer for layer in self._stirred if layer not in self._refused and not self._lacking(layer)
            }
        for layer in sorted(self._stirred | self._refused.keys()):
            if layer not in self._stirred and all(map(self._busy, self._refused[layer])):
                continue
            if not left:
                self._stirred.add(layer)
                continue
            left -= 1
            self._stirred.discard(layer)
            self._unfinished.add(layer)
            self._move(layer)
        if self.pursuit and not self._stirred:
            for layer in sorted(self._unfinished):
                if not self._may_pursue():
                    break
                self._move(layer)

    def _move(self, layer: int) -> None:
        self._refused.pop(layer, None)
        if not self.pursuit and not self._lacking(layer):
            return
        on_layer = {place[1]: copy for place, copy in self.copies.items() if place[0] == layer}
        if not self.pursuit and not self._uncared(layer, on_layer.values()):
            return
        ranks = {member.rank for member in self.staying}
        floor, spread = self.floor(layer), self.spread(layer)
        board = Layer(
            self.placement,
            layer,
            ranks=ranks,
            wanted=floor,
            spread=spread,
            coming={slot: copy.logical for slot, copy in on_layer.items()},
            given_up={slot for slot, copy in on_layer.items() if copy.overdue},
            closed={physical for at, physical in self.retry_at_ms if at == layer},
        )
        for change in board.restore():
            self._make(change)
        if self.pursuit and self._may_pursue():
            self._unfinished.discard(layer)
            for change in board.pursue(self.pursuit.layers[layer]):
                self._unfinished.add(layer)
                self._make(change, planned=True)
                if not self._may_pursue():
                    break

    def _lacking(self, layer: int) -> int:
        """A bit for each expert of it that should have more copies, or be on more hosts."""
        return self.counts().lacking(layer, self.floor(layer), self.spread(layer))

    def _uncared(self, layer: int, copies: Iterable[Copy]) -> int:
        """Those of the lacking of which no copy is being made in time. If there are none, a move would find nothing."""
        coming = {copy.logical for copy in copies if not copy.overdue}
        return self._lacking(layer) & ~sum(1 << expert for expert in coming)

    def counts(self) -> CopyCounts:
        """HAZARD: a machine that was restored, or copied, has those of another time."""
        if self._copies.placement is not self.placement:
            self._copies = CopyCounts(self.placement)
            self._count_anew()
        members, leaving = self._counted
        if members is not self.members or leaving is not self.leaving:
            self._count_anew()
        return self._copies

    def _count_anew(self) -> None:
        self._by_rank = {member.rank: member for member in self.members}
        self._copies.of(frozenset(member.rank for member in self.staying))
        self._counted = (self.members, self.leaving)

    def _may_pursue(self) -> bool:
        """A plan is not urgent, and steps must not become longer for it."""
        under_way = sum(c.planned and not c.overdue for c in self.copies.values()) + len(self.emptied)
        return under_way < max(1, len(self.members) // self.config.ranks_per_planned_copy)

    def _make(self, change: Change, *, planned: bool = False) -> None:
        """Publish, or order the copy unless the slot may still be read or addressed, or its rank is busy: then later."""
        if change.logical == EMPTY:
            self._publish(change)
            return
        layer, physical, logical = change
        if not self._writable((layer, physical)):
            return
        member = self._member_at(physical)
        if self._busy(member):
            self._refused.setdefault(layer, set()).add(member)
            return
        self.tickets += 1
        origin = self._origin(layer, physical, logical)
        deadline_ms = self.now_ms + self.config.copy_deadline_ms
        self.copies[layer, physical] = Copy(self.tickets, member, logical, origin, deadline_ms, planned)
        self._in_hand = None
        checksum = self.checksums.get((layer, logical))
        self._effects.append(ev.Order(member, self.tickets, layer, physical, logical, checksum, origin))

    def _busy(self, member: Member) -> bool:
        if self._in_hand is None:
            self._in_hand = Counter([copy.member for copy in self.copies.values()])
        return self._in_hand[member] >= self.config.copies_in_flight

    def _origin(self, layer: int, physical: int, logical: int) -> Origin | None:
        """The living owner with the fewest pulls from it. Without a checksum nobody's bytes can be trusted."""
        if (layer, logical) not in self.checksums:
            return None
        trusted = self.reachable - self.distrusted.get((layer, physical), frozenset())
        living = {member.rank for member in self.members & trusted}
        owners = [
            Origin(self._member_at(slot), slot)
            for slot, held in enumerate(self.placement.slots[layer])
            if held == logical and self.placement.rank_of(slot) in living
        ]
        return min(
            owners, key=lambda origin: (self._pulls_from(origin.member), origin.physical), default=None
        )

    def _publish(self, change: Change) -> None:
        """All changes of an event make one version: ranks that hear of hundreds have no time for their heartbeats."""
        version = self.placement.version + (not self._changes)
        self._changes.append(change)
        counts = self.counts()
        self.placement = self.placement.changed(version, [change])
        counts.change(change, self.placement)
        if change.logical == EMPTY:
            self.emptied[change.layer, change.physical] = version

    # Plans

    def _drop_plan(self) -> None:
        if self.pursuit:
            left = self._left(self.pursuit)
            self._effects.append(ev.PlanEnded(self.pursuit.made, left, self.pursuit.plan))
            self.pursuit = None

    def _end_plan_if_done(self) -> None:
        """Over when nothing is under way: it is carried out, or the rest cannot be without losing tolerance.

        A copy that is overdue may never be reported, and is not waited for.
        """
        awaited = any(not copy.overdue for copy in self.copies.values())
        if self.pursuit and not (awaited or self.emptied or self.retry_at_ms or self._stirred):
            self._drop_plan()

    def _left(self, pursuit: Pursuit) -> int:
        return sum(
            len(experts - set(self.placement.on_rank(layer, rank)))
            for layer, ranks in enumerate(pursuit.layers)
            for rank, experts in ranks.items()
        )

    # Reading

    def _member_at(self, physical: int) -> Member:
        self.counts()
        return self._by_rank[self.placement.rank_of(physical)]

    def _pulls_from(self, member: Member) -> int:
        return sum(copy.origin is not None and copy.origin.member == member for copy in self.copies.values())

    def _writable(self, place: Place) -> bool:
        """Nobody addresses the slot, and nobody reads from it."""
        read = ((at, c.origin.physical) for (at, _), c in self.copies.items() if c.origin)
        return place not in self.emptied and place not in read

    def _forget_emptied(self) -> None:
        if not self.emptied:
            return
        oldest = min(self._seen_versions(), default=self.placement.version)
        passed = [place for place, version in self.emptied.items() if version <= oldest]
        for place in passed:
            del self.emptied[place]
            self._stirred.add(place[0])
