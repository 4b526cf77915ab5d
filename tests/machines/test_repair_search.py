"""Every interleaving of boundaries, copies, deaths, returns, wrong bytes and lateness around small groups.

Proved within the bounds of each case: no slot is written to that a member may address or that is being read from;
what a published placement says is what lies in memory, but for the slot that was spoilt; tolerance is lost by deaths
and found corruption only, of one copy at most where two part that share a host, and no expert comes to be on fewer hosts
than it should; and every path ends with the tolerance that the slots of the living allow, in ranks and in hosts.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from dataclasses import dataclass, replace

import pytest

from elastic_ep.timing import RepairConfig
from tests.machines.test_repair import Group

pytestmark = pytest.mark.timeout(300)


@dataclass(frozen=True)
class Bounds:
    """How often each thing may happen on a path."""

    deaths: int = 0
    returns: int = 0
    errors: int = 0
    spoils: int = 0
    delays: int = 0
    """A copy takes so long that it is planned elsewhere."""


@dataclass(frozen=True)
class Case:
    name: str
    ranks: int
    experts: int
    redundant: int
    bounds: Bounds
    spare: int = 0
    turn: int = 0
    """There is a plan at the start: each rank is to hold what the rank so many further on holds."""
    hosts: tuple[int, ...] = ()
    swapped: bool = False
    """At the start ranks 1 and 2 have changed hosts, as if copies had been made where only that was possible."""

    def start(self) -> Group:
        group = Group(self.ranks, self.experts, self.redundant, spare=self.spare, hosts=self.hosts)
        if self.swapped:
            first, second, third, fourth = self.hosts
            group.machine.placement = replace(group.machine.placement, hosts=(first, third, second, fourth))
        group.machine.config = RepairConfig(copies_in_flight=1, ranks_per_planned_copy=2)
        for number in range(self.ranks):
            group.sum(number)
        group.reach()
        if self.turn:
            tolerated = group.tolerates
            group.plan({n: group.holds((n + self.turn) % self.ranks) for n in range(self.ranks)})
            assert group.tolerates == tolerated
        return group


CASES = (
    Case("two deaths, one after the other", 4, 3, 3, Bounds(deaths=2)),
    Case("a death, failing sources", 3, 3, 3, Bounds(deaths=1, errors=2), spare=1),
    Case("a death and its return", 3, 3, 4, Bounds(deaths=1, returns=1, errors=1)),
    Case("source or target dies", 4, 3, 3, Bounds(deaths=2, returns=1), spare=1),
    Case("wrong bytes at a source", 3, 3, 3, Bounds(deaths=1, spoils=1), spare=1),
    Case("a copy that hangs", 3, 3, 3, Bounds(deaths=1, delays=1, errors=1), spare=1),
    Case("a plan", 3, 3, 3, Bounds(errors=1), spare=1, turn=1),
    Case("a plan, a death, a return", 3, 2, 2, Bounds(deaths=1, returns=1), spare=1, turn=1),
    Case("a plan that empties sources", 4, 2, 2, Bounds(), spare=1, turn=2),
    Case("a plan without room", 3, 3, 3, Bounds(deaths=1), turn=1),
    Case("hosts, a death and a return", 4, 3, 3, Bounds(deaths=1, returns=1), hosts=(0, 0, 1, 1)),
    Case("three hosts and two deaths", 4, 2, 4, Bounds(deaths=2), hosts=(0, 0, 1, 2)),
    Case("copies part without room", 4, 2, 2, Bounds(deaths=1, returns=1), hosts=(0, 0, 1, 1), swapped=True),
    Case("a plan that minds hosts", 4, 2, 2, Bounds(), spare=1, turn=1, hosts=(0, 0, 1, 1)),
)


def key(group: Group) -> object:
    """Equal for groups that can only go on in the same way."""
    machine = group.machine
    newest = machine.placement.version
    ranks = tuple(
        (
            rank.member,
            tuple(map(tuple, rank.slots)),
            newest - rank.placement.version,
            rank.placement.slots,
            tuple(
                (order.physical, order.logical, order.origin, order.ticket in alive(group))
                for order in rank.orders
            ),
        )
        for rank in group.ranks.values()
    )
    copies = tuple(
        sorted((place, c.member, c.logical, c.origin, c.overdue) for place, c in machine.copies.items())
    )
    return (
        ranks,
        machine.placement.slots,
        repr(copies),
        tuple(sorted((place, newest - version) for place, version in machine.emptied.items())),
        tuple(sorted(machine.retry_at_ms)),
        repr(sorted(machine.distrusted.items())),
        tuple(sorted(machine.reachable)),
        repr(machine.pursuit and machine.pursuit.layers),
        tuple(group.rechecked),
    )


def alive(group: Group) -> set[int]:
    return {copy.ticket for copy in group.machine.copies.values()}


def moves(group: Group, left: Bounds, total: int) -> Iterator[tuple[str, Bounds]]:
    """What can happen next, as calls in words, and what may happen after it."""
    for number, rank in group.ranks.items():
        if rank.versions:
            yield f"adopt {number}", left
        if rank.orders:
            yield f"copy {number}", left
            if left.errors:
                yield f"fail {number}", replace(left, errors=left.errors - 1)
        if left.deaths and len(group.ranks) > 1:
            yield f"kill {number}", replace(left, deaths=left.deaths - 1)
    for number in range(total):
        if number not in group.ranks and left.returns:
            yield f"return {number}", replace(left, returns=left.returns - 1)
    if left.spoils:
        for physical, logical in enumerate(group.machine.placement.slots[0]):
            if logical >= 0 and group.machine.placement.rank_of(physical) in group.ranks:
                yield f"spoil {physical}", replace(left, spoils=0)
    if group.rechecked:
        yield "recheck 0", left
    if group.machine.retry_at_ms:
        yield "wait 1100", left
    if left.delays and any(not copy.overdue for copy in group.machine.copies.values()):
        yield "wait 20000", replace(left, delays=left.delays - 1)


def perform(group: Group, move: str) -> None:
    what, argument = move.split()
    number = int(argument)
    match what:
        case "adopt":
            group.adopt(number)
        case "copy":
            group.copy(number)
        case "fail":
            group.copy(number, error="no luck")
        case "kill":
            group.kill(number)
        case "return":
            group.launch(number)
            group.change_members()
            group.reach(number)
        case "spoil":
            group.spoil(0, number)
        case "recheck":
            group.recheck()
        case "wait":
            group.tick(number)


def hosts_tolerated(group: Group) -> int:
    return group.machine.placement.tolerates_hosts(set(group.ranks))


def check(group: Group, move: str, tolerated: int, hosts: int) -> None:
    """`tolerated` ranks and `hosts` before the move."""
    group.check_memory()
    if move.split()[0] not in ("kill", "recheck"):
        parting = bool(group.machine.placement.hosts)
        assert group.tolerates >= min(tolerated, group.possible) - parting, "tolerance is lost on the way"
        assert hosts_tolerated(group) >= min(hosts, group.machine.spread(0) - 1), "a host is lost on the way"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_interleaving(case: Case) -> None:
    start = case.start()
    frontier: list[tuple[bytes, Bounds, tuple[str, ...]]] = [(pickle.dumps(start), case.bounds, ())]
    seen = {(key(start), case.bounds)}
    ends = 0
    while frontier:
        following = []
        for state, bounds, path in frontier:
            group: Group = pickle.loads(state)
            possible = list(moves(group, bounds, case.ranks))
            if not possible:
                ends += 1
                assert group.tolerates >= group.possible, f"tolerance does not come back after {path}"
                assert group.is_spread, f"copies share a host after {path}"
                assert group.machine.pursuit is None, f"a plan never ends after {path}"
            for move, left in possible:
                group = pickle.loads(state)
                try:
                    tolerated, hosts = group.tolerates, hosts_tolerated(group)
                    perform(group, move)
                    check(group, move, tolerated, hosts)
                except AssertionError as error:
                    raise AssertionError(f"{error}, after {(*path, move)}") from error
                if (found := (key(group), left)) not in seen:
                    seen.add(found)
                    following.append((pickle.dumps(group), left, (*path, move)))
        frontier = following
    print(f"{case.name}: {len(seen)} states, {ends} ends")
    assert ends
