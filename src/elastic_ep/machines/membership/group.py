"""The group's lifecycle, and what the membership machine knows of each rank and of an attempt in progress."""

from __future__ import annotations

from dataclasses import dataclass

from elastic_ep.machines.membership.events import GroupState
from elastic_ep.machines.tables import Row, Table, TableMachine
from elastic_ep.wire.messages import Member, RankState

_RUNNING = (
    GroupState.SERVING,
    GroupState.DEGRADED,
    GroupState.ADMITTING,
    GroupState.PAUSED,
    GroupState.HOLDING,
)

GROUP = Table(
    name="group",
    initial=GroupState.FORMING,
    rows=(
        Row("admit", (GroupState.FORMING, *_RUNNING), GroupState.ADMITTING),
        Row("all_seats_filled", _RUNNING, GroupState.SERVING),
        Row("seat_empty", _RUNNING, GroupState.DEGRADED),
        Row("park", _RUNNING, GroupState.PAUSED),
        Row("expert_uncovered", _RUNNING, GroupState.HOLDING),
        Row("nobody_left", _RUNNING, GroupState.FORMING),
        Row("stop", (GroupState.FORMING, *_RUNNING), GroupState.STOPPING),
    ),
    final=frozenset({GroupState.STOPPING}),
)
TRIGGER_TO = {row.dest: row.trigger for row in GROUP.rows}


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
