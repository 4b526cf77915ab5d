"""What state the group is in, and what the membership machine knows of each rank and of an attempt in progress."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from elastic_ep.machines.membership.events import GroupState
from elastic_ep.machines.tables import TableMachine
from elastic_ep.wire.messages import Member, RankState, View


@dataclass
class Slot:
    """What the controller knows of one rank."""

    member: Member
    lifecycle: TableMachine
    reason: str = ""
    early_deaths: int = 0
    """In a row, as the relaunch policy counts them."""
    missed_attempts: int = 0
    """Attempts in a row that it let time out as a member: it became one by a promise."""
    since_ms: int | None = None
    """When it came into its present state; None before the group was started."""
    gone: bool = False
    fenced: str = ""
    told_to_stop: bool = False
    relaunch_at_ms: int | None = None
    wanted_back: bool = False
    """An operator wants it launched as soon as its process is gone."""
    away: bool = False
    """It is gone and is not launched again by itself."""
    died_in: RankState | None = None
    """The state in which the present incarnation, or the last one, was lost."""
    served_ms: int | None = None
    """How long that incarnation had its seat; None: it had none."""
    suspects: tuple[int, ...] = ()
    """Requests that it names as what made it fail."""
    failed: str = ""
    """Why it could not go on, by its own account or because it got stuck while starting."""
    start_failure: str = ""
    """Why the last launch never got ready; empty once one has."""

    @property
    def state(self) -> RankState:
        return RankState(self.lifecycle.state)


@dataclass(frozen=True)
class Attempt:
    number: int
    joiners: frozenset[Member]
    """Empty: the attempt is to park."""
    awaited: frozenset[Member]
    first_step: int
    deadline_ms: int


class Facts(Protocol):
    """What the group's state is derived from; the membership machine has it."""

    num_ranks: int
    stopping: bool
    attempt: Attempt | None
    view: View

    @property
    def covered(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class Case:
    state: GroupState
    when: str
    """In words, for the chart."""
    holds: Callable[[Facts], bool]


GROUP = (
    Case(GroupState.STOPPING, "it was asked to stop", lambda m: m.stopping),
    Case(GroupState.ADMITTING, "ranks are being admitted", lambda m: bool(m.attempt and m.attempt.joiners)),
    Case(GroupState.FORMING, "nobody has a seat", lambda m: not m.view.seats),
    Case(GroupState.HOLDING, "an expert has no copy", lambda m: not m.covered),
    Case(GroupState.PAUSED, "the members are parked", lambda m: m.view.park_at is not None),
    Case(GroupState.SERVING, "every rank has a seat", lambda m: len(m.view.seats) == m.num_ranks),
    Case(GroupState.DEGRADED, "else", lambda m: True),
)
"""The group's state is the first one that holds."""
