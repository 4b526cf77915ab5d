"""When an idle group is asked to park: a while after whatever happened last, an attempt that came to nothing included."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from elastic_ep.machines.contract import Tick
from elastic_ep.machines.membership import events as ev
from elastic_ep.machines.membership.machine import MembershipMachine
from elastic_ep.wire.messages import Abort, Member, Prepare, RankState
from tests.machines.test_membership import CONFIG, machine_of

RANKS = 3
JOINER, OTHER = Member(2, 2), Member(0, 1)


def promise(machine: MembershipMachine, *silent: Member) -> None:
    assert machine.attempt is not None
    for member in sorted(machine.attempt.awaited - set(silent)):
        machine.step(ev.Promised(member, machine.attempts, 5))


def come_up(machine: MembershipMachine, member: Member) -> list[ev.Effect]:
    effects = machine.step(ev.ProcessStarted(member))
    for state in (RankState.INIT_DIST, RankState.JOINING):
        effects = machine.step(ev.Reported(member, state))
    return effects


def idle_group_with_a_joiner() -> MembershipMachine:
    """It would have been asked to park by now, but for an attempt to admit somebody."""
    machine = machine_of(RANKS, redundant=2 * RANKS)
    machine.step(ev.Start())
    machine.step(ev.WorkBegan())
    for rank in range(RANKS):
        come_up(machine, Member(rank, 1))
    promise(machine)
    machine.step(ev.DeathNoticed(Member(2, 1), "killed"))
    machine.step(ev.ProcessGone(Member(2, 1), "SIGKILL"))
    machine.step(ev.WorkEnded())
    come_up(machine, JOINER)
    assert machine.attempt is not None
    assert machine.attempt.joiners == {JOINER}
    machine.step(Tick(machine.now_ms + 2 * CONFIG.park_after_ms))
    return machine


def joiner_dies(machine: MembershipMachine) -> list[ev.Effect]:
    return machine.step(ev.DeathNoticed(JOINER, "killed"))


def member_dies(machine: MembershipMachine) -> list[ev.Effect]:
    """The joiner then waits for the next attempt, which is not to park."""
    machine.step(ev.DeathNoticed(JOINER, "killed"))
    machine.step(Tick(machine.now_ms + CONFIG.park_after_ms))
    assert machine.attempt is not None
    assert not machine.attempt.joiners
    machine.step(Tick(machine.now_ms + CONFIG.park_after_ms))
    return machine.step(ev.DeathNoticed(OTHER, "killed"))


def it_takes_too_long(machine: MembershipMachine) -> list[ev.Effect]:
    promise(machine, JOINER)
    assert machine.attempt is not None
    return machine.step(Tick(machine.attempt.deadline_ms))


@pytest.mark.parametrize("what_happens", [joiner_dies, member_dies, it_takes_too_long])
def test_an_attempt_that_came_to_nothing_restarts_the_clock(
    what_happens: Callable[[MembershipMachine], list[ev.Effect]],
) -> None:
    machine = idle_group_with_a_joiner()
    effects = what_happens(machine)
    assert any(isinstance(e, ev.Publish) and isinstance(e.body, Abort) for e in effects)
    assert machine.attempt is None
    due_ms = machine.now_ms + CONFIG.park_after_ms
    assert machine.step(Tick(due_ms - 1)) == []
    assert machine.next_deadline_ms() == due_ms, "nobody wakes it in time"
    (asked,) = machine.step(Tick(due_ms))
    assert isinstance(asked, ev.Publish)
    assert isinstance(asked.body, Prepare)
    assert asked.body.joiners == ()
