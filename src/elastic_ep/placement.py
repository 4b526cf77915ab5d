"""Which physical expert holds which logical expert.

Physical expert `p` is slot `p % slots_per_rank` of rank `p // slots_per_rank`. A rank is on a host, whose death is the
death of all its ranks: so copies of an expert are on different ranks, and on different hosts as far as these allow.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain, product
from typing import NamedTuple

EMPTY = -1


class Change(NamedTuple):
    """Slot `physical` of `layer` now holds `logical` (or `EMPTY`)."""

    layer: int
    physical: int
    logical: int


@dataclass(frozen=True, slots=True)
class Placement:
    """`slots[layer][physical]` is the logical expert there, or `EMPTY`. A new `version` for every change.

    `hosts[rank]` is a number of the rank's host; nothing: all ranks are on one host.
    """

    version: int
    num_ranks: int
    slots_per_rank: int
    num_experts: int
    slots: tuple[tuple[int, ...], ...]
    hosts: tuple[int, ...] = ()

    def changed(self, version: int, changes: Iterable[Change]) -> Placement:
        """The placement with `changes` made. Layers without a change are shared with this one."""
        changed: dict[int, list[int]] = {}
        for layer, physical, logical in changes:
            changed.setdefault(layer, list(self.slots[layer]))[physical] = logical
        rows = list(self.slots)
        for layer, row in changed.items():
            rows[layer] = tuple(row)
        return replace(self, version=version, slots=tuple(rows))

    def rank_of(self, physical: int) -> int:
        return physical // self.slots_per_rank

    def host_of(self, rank: int) -> int:
        return self.hosts[rank] if self.hosts else 0

    def by_host(self, ranks: Iterable[int]) -> dict[int, list[int]]:
        """`ranks`, in their order, by the hosts that they are on."""
        if not self.hosts:
            return {0: list(ranks)}
        found: dict[int, list[int]] = defaultdict(list)
        for rank in ranks:
            found[self.hosts[rank]].append(rank)
        return dict(found)

    def host_copies(self, layer: int, ranks: Collection[int]) -> list[int]:
        """How many hosts of `ranks` hold each logical expert there, shape [num_experts]."""
        row, width = self.slots[layer], self.slots_per_rank
        held: dict[int, set[int]] = {}
        for host, there in self.by_host(ranks).items():
            held[host] = set()
            for rank in there:
                held[host].update(row[rank * width : (rank + 1) * width])
        return self._counts(held.values())

    def spread(self, ranks: Collection[int], copies: int) -> int:
        """On how many hosts each expert can be, if it has `copies` copies on `ranks`: at most, and at least 1."""
        if not self.hosts:
            return 1
        rooms = [len(there) * self.slots_per_rank for there in self.by_host(ranks).values()]
        return most_hosts(rooms, self.num_experts, copies)

    def copies(self, layer: int, ranks: Collection[int]) -> list[int]:
        """How many of `ranks` hold each logical expert, shape [num_experts]."""
        row, width = self.slots[layer], self.slots_per_rank
        return self._counts(set(row[rank * width : (rank + 1) * width]) for rank in ranks)

    def _counts(self, held: Iterable[set[int]]) -> list[int]:
        """In how many each logical expert is, shape [num_experts]."""
        counts = Counter(chain.from_iterable(held))
        return [counts[expert] for expert in range(self.num_experts)]

    def on_rank(self, layer: int, rank: int) -> tuple[int, ...]:
        """The logical expert of each slot of `rank`, shape [slots_per_rank]."""
        start = rank * self.slots_per_rank
        return self.slots[layer][start : start + self.slots_per_rank]

    def tolerates(self, ranks: Collection[int]) -> int:
        """How many more of `ranks` can be lost, in the worst case, with every expert still alive; -1: held now."""
        return min(min(self.copies(layer, ranks)) for layer in range(len(self.slots))) - 1

    def tolerates_hosts(self, ranks: Collection[int]) -> int:
        """How many more of the hosts that `ranks` are on can be lost, likewise."""
        return min(min(self.host_copies(layer, ranks)) for layer in range(len(self.slots))) - 1


@dataclass(frozen=True, slots=True)
class Coverage:
    """Whether some ranks hold every expert of a placement: asked at every event, so a matter of a few operations.

    `held[rank]` has a bit for every (layer, logical expert) that the rank holds, `everything` all of them.
    """

    held: tuple[int, ...]
    everything: int

    @classmethod
    def of(cls, placement: Placement) -> Coverage:
        held = tuple(_held(placement, rank) for rank in range(placement.num_ranks))
        return cls(held, (1 << len(placement.slots) * placement.num_experts) - 1)

    def after(self, changes: Iterable[Change], placement: Placement) -> Coverage:
        """That of `placement`, which `changes` led to."""
        touched = {placement.rank_of(change.physical) for change in changes}
        held = [
            _held(placement, rank) if rank in touched else before for rank, before in enumerate(self.held)
        ]
        return replace(self, held=tuple(held))

    def by(self, ranks: Iterable[int]) -> bool:
        """Whether every logical expert of every layer has a copy on one of `ranks`."""
        held = 0
        for rank in ranks:
            held |= self.held[rank]
        return held == self.everything


class CopyCounts:
    """How many of some ranks, and of their hosts, hold each expert of a placement: asked of a whole model at once, and
    for little more than what has changed since.

    A bit stands for each (layer, logical expert), as in `Coverage`.
    """

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        self.ranks: frozenset[int] = frozenset()
        self._held = {rank: _held(placement, rank) for rank in range(placement.num_ranks)}
        self._on_host: dict[int, set[int]] = defaultdict(set)
        """The `ranks` of each host."""
        self._by_rank, self._by_host = _Tally(), _Tally()
        self._everything = (1 << len(placement.slots) * placement.num_experts) - 1
        self._lacking: dict[tuple[int, int], int] = {}
        """What was asked since the last change."""
        self._spread: dict[int, int] = {}

    def of(self, ranks: frozenset[int]) -> None:
        """Count these ranks from now on."""
        if ranks == self.ranks:
            return
        touched = {self.placement.host_of(rank) for rank in ranks ^ self.ranks}
        before = {host: self._host(host) for host in touched}
        for rank in self.ranks - ranks:
            self._by_rank.remove(self._held[rank])
            self._on_host[self.placement.host_of(rank)].discard(rank)
        for rank in ranks - self.ranks:
            self._by_rank.add(self._held[rank])
            self._on_host[self.placement.host_of(rank)].add(rank)
        self.ranks = ranks
        self._recount(before)
        self._spread.clear()

    def change(self, change: Change, placement: Placement) -> None:
        """`placement` is what it led to."""
        layer, physical, logical = change
        rank, old = placement.rank_of(physical), self.placement.slots[layer][physical]
        host = placement.host_of(rank)
        before = {host: self._host(host)}
        counted = rank in self.ranks
        if counted:
            self._by_rank.remove(self._held[rank])
        for expert in (old, logical):  # no rank has two copies of one
            if expert != EMPTY:
                self._held[rank] ^= 1 << layer * placement.num_experts + expert
        if counted:
            self._by_rank.add(self._held[rank])
        self.placement = placement
        self._recount(before)

    def lacking(self, layer: int, copies: int, hosts: int) -> int:
        """A bit for each expert of the layer that has fewer copies than that, or is on fewer hosts."""
        if (copies, hosts) not in self._lacking:
            enough = self._by_rank.at_least(copies, self._everything)
            if hosts > 1:
                enough &= self._by_host.at_least(hosts, self._everything)
            self._lacking[copies, hosts] = self._everything & ~enough
        experts = self.placement.num_experts
        return self._lacking[copies, hosts] >> layer * experts & (1 << experts) - 1

    def least(self) -> tuple[int, int]:
        """Copies of the expert that has fewest, and hosts of the one that is on fewest."""
        return self._by_rank.least(self._everything), self._by_host.least(self._everything)

    def spread(self, copies: int) -> int:
        """As `Placement.spread`, of the ranks that are counted."""
        if copies not in self._spread:
            self._spread[copies] = self.placement.spread(self.ranks, copies)
        return self._spread[copies]

    def _host(self, host: int) -> int:
        held = 0
        for rank in self._on_host[host]:
            held |= self._held[rank]
        return held

    def _recount(self, before: dict[int, int]) -> None:
        for host, held in before.items():
            now = self._host(host)
            self._by_host.remove(held & ~now)
            self._by_host.add(now & ~held)
        self._lacking.clear()


class _Tally:
    """A counter for each bit. Number `at` in `planes` has bit `at` of all counters."""

    def __init__(self) -> None:
        self.planes: list[int] = []

    def add(self, bits: int) -> None:
        for at, plane in enumerate(self.planes):
            if not bits:
                return
            self.planes[at] = plane ^ bits
            bits &= plane
        if bits:
            self.planes.append(bits)

    def remove(self, bits: int) -> None:
        """None of their counters is 0."""
        for at, plane in enumerate(self.planes):
            if not bits:
                return
            self.planes[at] = plane ^ bits
            bits &= ~plane

    def least(self, among: int) -> int:
        """Of the counters of these bits."""
        count = 0
        while self.at_least(count + 1, among) == among:
            count += 1
        return count

    def at_least(self, count: int, among: int) -> int:
        if count >> len(self.planes):
            return 0
        more, equal = 0, among
        for at in reversed(range(len(self.planes))):
            plane = self.planes[at]
            if count >> at & 1:
                equal &= plane
            else:
                more |= equal & plane
                equal &= ~plane
        return more | equal


def _held(placement: Placement, rank: int) -> int:
    held = 0
    for layer in range(len(placement.slots)):
        in_layer = 0
        for expert in placement.on_rank(layer, rank):
            if expert != EMPTY:
                in_layer |= 1 << expert
        held |= in_layer << layer * placement.num_experts
    return held


def most_hosts(rooms: Iterable[int], num_experts: int, copies: int) -> int:
    """On how many hosts every expert can be, with `rooms` slots on each host and `copies` copies of each; at least 1.

    A host has use for one copy of each expert. Whatever the rooms are, that is enough (Gale and Ryser's theorem).
    """
    useful = [min(room, num_experts) for room in rooms]
    return max(1, min(copies, len(useful), sum(useful) // num_experts))


def launch_placement(
    num_ranks: int,
    num_layers: int,
    num_experts: int,
    num_redundant: int,
    num_spare: int = 0,
    hosts: Sequence[int] = (),
) -> Placement:
    """The placement a group starts with, the same in every layer.

    Every expert has as many copies as every other, or one more, each on another rank; a copy beyond one on each
    rank is left out. An expert's copies go to the emptiest ranks, which keeps all ranks within one copy of each
    other, so that the slots always suffice. Among equally empty ranks those win that share the fewest experts, so
    that what a lost rank held is spread over many survivors. `num_spare` slots of every rank stay empty.

    `hosts[rank]`: no two copies of an expert are on one host while there are hosts, and slots on them, enough. Ranks may
    then differ by more than one copy, if hosts have unequally many ranks.
    """
    total = num_experts + num_redundant
    slots_per_rank = -(-total // num_ranks) + num_spare
    copies = [
        min(num_ranks, total // num_experts + (expert < total % num_experts)) for expert in range(num_experts)
    ]
    if hosts and len(hosts) != num_ranks:
        raise ValueError(f"hosts of {len(hosts)} ranks, but there are {num_ranks}")
    hands = _hands_on_hosts(copies, slots_per_rank - num_spare, hosts) if len(set(hosts)) > 1 else None
    if hands is None:
        hands = _hands(copies, num_ranks)
    row = tuple(expert for hand in hands for expert in hand + [EMPTY] * (slots_per_rank - len(hand)))
    return Placement(0, num_ranks, slots_per_rank, num_experts, (row,) * num_layers, tuple(hosts))


def grown(placement: Placement, hosts: Sequence[int], num_spare: int = 0) -> Placement:
    """With the rows of ranks that come later: `hosts[rank]`, of all of them, begins with the hosts that are there.

    They hold further copies, so that whoever comes first finds its share: on each rank those experts that have fewest
    copies by then and none on its host. All layers of `placement` are alike, and stay so.
    """
    row = list(placement.slots[0])
    copies = Counter(row)
    on_host: dict[int, set[int]] = defaultdict(set)
    width = min(placement.slots_per_rank - num_spare, placement.num_experts)
    for host in hosts[placement.num_ranks :]:
        there = on_host[host]
        hand = sorted(range(placement.num_experts), key=lambda expert: (expert in there, copies[expert]))[
            :width
        ]
        copies.update(hand)
        there.update(hand)
        row += hand + [EMPTY] * (placement.slots_per_rank - len(hand))
    return replace(
        placement, num_ranks=len(hosts), slots=(tuple(row),) * len(placement.slots), hosts=tuple(hosts)
    )


def _hands(copies: Sequence[int], num_ranks: int) -> list[list[int]]:
    """What each rank is given, hosts not minded."""
    hands: list[list[int]] = [[] for _ in range(num_ranks)]
    shared = [[0] * num_ranks for _ in range(num_ranks)]
    for expert, count in enumerate(copies):
        holders: list[int] = []
        for _ in range(count):
            others = [rank for rank in range(num_ranks) if rank not in holders]
            holders.append(min(others, key=lambda rank: (len(hands[rank]), _overlap(shared[rank], holders))))
        for rank in holders:
            hands[rank].append(expert)
            for other in holders:
                shared[rank][other] += 1
    return hands


def _hands_on_hosts(copies: Sequence[int], slots: int, hosts: Sequence[int]) -> list[list[int]] | None:
    """What each rank is given if copies keep to different hosts; None if this way of giving leaves one over.

    Each copy goes to the host with most room left, which leaves room on as many hosts as can be for the next expert.
    First each rank has room for its even share; if that keeps experts from hosts that slots would allow, for all its
    slots. And what some experts have beyond the copies that all have on different hosts is given with these, or last.
    """
    wanted = most_hosts([slots * hosts.count(host) for host in set(hosts)], len(copies), min(copies))
    most = len(hosts)
    for rooms, stages in product(
        (_even_shares(sum(copies), hosts), [slots] * len(hosts)), ((most,), (wanted, most))
    ):
        left = list(rooms)
        hands: list[list[int]] = [[] for _ in hosts]
        shared = [[0] * len(hosts) for _ in hosts]
        holders: list[list[int]] = [[] for _ in copies]
        for stage in stages:
            for expert, count in enumerate(copies):
                while len(holders[expert]) < min(count, stage):
                    rank = _next_holder(holders[expert], left, hosts, shared)
                    if rank is None:
                        break
                    left[rank] -= 1
                    hands[rank].append(expert)
                    for other in holders[expert]:
                        shared[rank][other] += 1
                        shared[other][rank] += 1
                    holders[expert].append(rank)
        if all(
            len(given) == count and len({hosts[rank] for rank in given}) >= wanted
            for given, count in zip(holders, copies, strict=True)
        ):
            return hands
    return None


def _next_holder(
    holders: list[int], left: Sequence[int], hosts: Sequence[int], shared: Sequence[list[int]]
) -> int | None:
    """A rank with room `left` for one more copy: on a host without one, if there is one."""
    rooms: dict[int, int] = {}
    for host, room in zip(hosts, left, strict=True):
        rooms[host] = rooms.get(host, 0) + room
    taken = {hosts[holder] for holder in holders}
    return min(
        (rank for rank, room in enumerate(left) if room and rank not in holders),
        key=lambda rank: (
            hosts[rank] in taken,
            -rooms[hosts[rank]],
            -left[rank],
            _overlap(shared[rank], holders),
        ),
        default=None,
    )


def _even_shares(total: int, hosts: Sequence[int]) -> list[int]:
    """Of each rank, within one of each other; who has one more is spread over hosts."""
    turns: dict[int, int] = {}
    order = []
    for rank, host in enumerate(hosts):
        turns[host] = turns.get(host, 0) + 1
        order.append((turns[host] / hosts.count(host), rank))
    shares = [total // len(hosts)] * len(hosts)
    for _, rank in sorted(order)[: total % len(hosts)]:
        shares[rank] += 1
    return shares


def _overlap(shared: list[int], holders: list[int]) -> int:
    return sum(shared[holder] for holder in holders)
