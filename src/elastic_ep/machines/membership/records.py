"""What the membership machine knows of each rank, and of an attempt in progress."""

from __future__ import annotations

from dataclasses import dataclass

from elastic_ep.machines.membership.events import AS_ASKED
from elastic_ep.machines.membership.relaunch import (
    Death,
    early_deaths,
    explain,
    killed_from_outside,
    pause_ms,
)
from elastic_ep.machines.rank.lifecycle import SEATED
from elastic_ep.machines.tables import TableMachine
from elastic_ep.timing import MembershipConfig
from elastic_ep.wire.messages import Member, RankState

STARTING = (RankState.LAUNCHING, RankState.INIT_CUDA, RankState.INIT_DIST)


@dataclass
class RankRecord:
    """What the controller knows of one rank, through all its incarnations."""

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
    """Nothing is left of its present incarnation, or that is for its host to end: the next one may be launched."""
    unended: frozenset[Member] = frozenset()
    """Its incarnations before that were lost with their hosts, and may be at work yet: it is not admitted."""
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
        state: RankState = self.lifecycle.state
        return state

    @property
    def over(self) -> bool:
        """Its present incarnation is lost, or has ended."""
        return self.lifecycle.final

    def init_due_ms(self, config: MembershipConfig) -> int | None:
        """When a rank that is starting up must have reached its next state."""
        if self.since_ms is None or self.fenced or self.state not in STARTING:
            return None
        return self.since_ms + config.init_deadline_ms

    def why_ended(self, otherwise: str) -> str:
        return self.fenced or (AS_ASKED if self.told_to_stop else otherwise)

    def explained(self, now_ms: int, config: MembershipConfig) -> str:
        """Why it is not well, and if it waits for its next launch, how long it does."""
        if not self.away and self.relaunch_at_ms is None:
            return self.reason
        wait_ms = None if self.relaunch_at_ms is None else max(0, self.relaunch_at_ms - now_ms)
        return explain(self.reason, self.early_deaths, wait_ms, config)

    def lost(self, now_ms: int, reason: str) -> None:
        self.died_in, self.reason = self.state, reason
        if self.state in SEATED:
            self.served_ms = now_ms - (self.since_ms or 0)

    def count_death(self, status: str, config: MembershipConfig) -> None:
        death = Death(status, self.served_ms, bool(self.fenced), bool(self.suspects))
        self.early_deaths = early_deaths(self.early_deaths, death, config)
        if self.died_in in STARTING:
            outside = self.fenced or killed_from_outside(status)
            self.start_failure = self.failed if outside else self.reason

    def plan_relaunch(self, now_ms: int, config: MembershipConfig) -> None:
        """From when on it is to be launched again, if it is by itself."""
        wait_ms = 0 if self.wanted_back else pause_ms(self.early_deaths, config)
        self.away = wait_ms is None
        self.relaunch_at_ms = None if wait_ms is None else now_ms + wait_ms

    def begin_anew(self) -> None:
        """The next incarnation. What counts over several of them stays."""
        self.relaunch_at_ms = None
        self.member = Member(self.member.rank, self.member.incarnation + 1)
        self.gone = self.away = self.wanted_back = self.told_to_stop = False
        self.fenced = self.failed = ""
        self.suspects = ()
        self.died_in = self.served_ms = None


@dataclass(frozen=True)
class Attempt:
    number: int
    joiners: frozenset[Member]
    """Empty: the attempt is to park."""
    awaited: frozenset[Member]
    first_step: int
    deadline_ms: int
