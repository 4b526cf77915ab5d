"""A group on several hosts has no split, no two incarnations at work and no dead end, within the bounds of `CASES`.

And the search finds the mistakes that the rules of leases and of lost hosts are there to prevent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from elastic_ep.machines.hosts.lease import Lease
from elastic_ep.machines.hosts.machine import HostsMachine, Place
from elastic_ep.machines.membership import events as ev
from elastic_ep.machines.membership.machine import MembershipMachine
from elastic_ep.wire.messages import Seat
from tests.machines.hosts_search import CASES, HostsCase
from tests.machines.membership_model import Bounds


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_several_hosts_have_no_split_and_no_dead_end(
    case: HostsCase, record_property: Callable[..., None]
) -> None:
    model, found = case.run()
    print(found)
    record_property("states", found.states)
    assert not found.violation, str(found)
    assert found.ends > 0, "no path came to its end"
    assert any(hosts.endings for hosts in model.machines)
    if case.bounds.relaunch:
        everybody = [m for m in model.controllers if len(m.view.seats) == len(case.hosts)]
        assert any(seat.incarnation > 1 for machine in everybody for seat in machine.view.seats)
    if case.grows:
        assert (
            min(len(m.view.seats) for m in model.controllers)
            < len(case.hosts)
            == max(len(m.view.seats) for m in model.controllers)
        )
    if case.machines > 1:
        addresses = {place.address for hosts in model.machines for place in hosts.places.values()}
        assert addresses > {"host 0", "host 1"}, "the spare never got the number"


CUT_BESIDE_A_SPARE = HostsCase("mutant", (0, 1), Bounds(0, relaunch=True), machines=2, cuts=1)
TWO_RANKS_DIE = HostsCase("mutant", (0, 1, 1), Bounds(1), host_deaths=1)


def test_counting_ranks_as_gone_before_the_lease_ends_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    lose = HostsMachine._lose

    def lose_for_good(self: HostsMachine, place: Place, why: str, over: bool = False) -> None:
        token = place.token
        lose(self, place, why)
        self._end(token)

    monkeypatch.setattr(HostsMachine, "_lose", lose_for_good)
    _, found = CUT_BESIDE_A_SPARE.run()
    assert found.violation == "two incarnations at work: 1.1 runs, and counts as gone", str(found)


def test_admitting_whoever_is_ready_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = MembershipMachine._on_host_lost

    def forget(self: MembershipMachine, event: ev.HostLost) -> None:
        lost(self, event)
        for record in self.records.values():
            record.unended = frozenset()

    monkeypatch.setattr(MembershipMachine, "_on_host_lost", forget)
    _, found = CUT_BESIDE_A_SPARE.run()
    assert found.violation == "two incarnations at work: 1.1 runs, and 1.2 is admitted", str(found)


def test_a_lease_that_counts_from_the_answer_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def answered(self: Lease, number: int) -> bool:
        self.until, self.sent = self.length, {}  # in the model it is always 0 o'clock
        return True

    monkeypatch.setattr(Lease, "answered", answered)
    # A step begun or not makes no difference here.
    _, found = replace(CUT_BESIDE_A_SPARE, bounds=Bounds(-1, relaunch=True), cuts=2, late=1).run()
    assert found.violation.startswith("two incarnations at work"), str(found)


def test_forgetting_one_rank_of_a_lost_host_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    lost = MembershipMachine._on_host_lost

    def all_but_one(self: MembershipMachine, event: ev.HostLost) -> None:
        lost(self, replace(event, members=event.members[:-1]))

    monkeypatch.setattr(MembershipMachine, "_on_host_lost", all_but_one)
    monkeypatch.setattr(MembershipMachine, "_on_gone", lambda self, event: None)
    _, found = TWO_RANKS_DIE.run()
    assert found.violation.startswith("stuck: "), str(found)


def test_a_view_that_keeps_a_lost_member_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    publish = MembershipMachine._publish_view

    def keep_one(self: MembershipMachine, seats: tuple[Seat, ...], park_at: int | None) -> None:
        lost = [seat for seat in self.view.seats if seat not in seats]
        publish(self, (*seats, *lost[:1]), park_at)

    monkeypatch.setattr(MembershipMachine, "_publish_view", keep_one)
    _, found = TWO_RANKS_DIE.run()
    assert found.violation == "controller: 1.1 seated in Failed", str(found)


def test_growth_that_is_forgotten_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MembershipMachine, "_on_grown", lambda self, event: None)
    _, found = HostsCase("mutant", (0, 1), Bounds(0, relaunch=True), grows=1).run()
    assert found.violation.startswith("stuck: only "), str(found)
