"""The watch over progress: what ranks have said of themselves goes to the progress machine, pulse by pulse."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import anyio
import structlog

from elastic_ep.event_log.log import EventLog
from elastic_ep.group.clock import Clock
from elastic_ep.group.hub import Hub
from elastic_ep.group.port import LossCause
from elastic_ep.machines.membership import events as ev
from elastic_ep.machines.membership.machine import MembershipMachine
from elastic_ep.machines.membership.progress import (
    MemberBeat,
    ProgressMachine,
    Pulse,
    Starved,
    Suspect,
)
from elastic_ep.timing import Timing
from elastic_ep.wire.messages import NO_PAGES, Heartbeat, Member, PageCounts, RankState, StepReport

COMING_UP = (RankState.INIT_CUDA, RankState.INIT_DIST, RankState.JOINING)
NOTED_PAUSE_MS = 500
"""Whoever reads the log is told when the watch was held up for longer."""
log = structlog.get_logger()


@dataclass
class RankFacts:
    """What is known of a member besides its lifecycle."""

    pid: int | None = None
    running: int = 0
    waiting: int = 0
    step: int = 0
    pages: PageCounts = NO_PAGES


class ProgressWatch:
    """The progress machine's shell. `suspect` is told of members that hang. `facts` are the controller's. `starved` says
    who of some processes waited for a processor since it was asked before.
    """

    def __init__(
        self,
        hub: Hub,
        clock: Clock,
        group: MembershipMachine,
        progress: ProgressMachine,
        facts: Mapping[Member, RankFacts],
        log: EventLog,
        timing: Timing,
        suspect: Callable[[Member, LossCause, str], None],
        starved: Callable[[Mapping[Member, int]], Awaitable[tuple[Starved, ...]]],
    ) -> None:
        self._hub = hub
        self._clock = clock
        self._group = group
        self._progress = progress
        self._facts = facts
        self._log = log
        self._timing = timing
        self._suspect = suspect
        self._starved = starved
        self._signs_of_life: dict[Member, Heartbeat | StepReport] = {}
        """Since the last pulse, the newest of each member."""
        hub.attach("progress", progress, self, clocked=False)

    def heard(self, member: Member, sign: Heartbeat | StepReport) -> None:
        """A rank that reports its steps sends no heartbeats: the reports are."""
        self._signs_of_life[member] = sign

    async def run(self) -> None:
        while True:
            pause_s = self._timing.pulse_ms / 1000 * self.calm
            self._clock.rest(pause_s)
            await anyio.sleep(pause_s)
            held_up_ms = self._clock.held_up_ms()
            if held_up_ms > NOTED_PAUSE_MS:
                self._log.note("held_up", ms=held_up_ms)
                log.warning(
                    "the machine, or this process, stood still: no rank is judged by it", for_ms=held_up_ms
                )
            self._pulse(await self._starved_of_doubtful())

    async def _starved_of_doubtful(self) -> tuple[Starved, ...]:
        """Nobody, if it is not said in time."""
        with anyio.move_on_after(self._timing.pulse_ms / 1000):
            return await self._starved(self._pids(self._progress.doubtful()))
        return ()

    @property
    def calm(self) -> int:
        """How much rarer things are checked while the group is parked."""
        return self._timing.calm_factor if self._group.group_state is ev.GroupState.PAUSED else 1

    def _pulse(self, starved: tuple[Starved, ...]) -> None:
        records = self._group.records.values()
        pulse = Pulse(
            now_ms=self._clock.now_ms(),
            seated=tuple(sorted(self._group.view.members)),
            starting=tuple(record.member for record in records if record.state in COMING_UP),
            beats=tuple([_beat(member, sign) for member, sign in self._signs_of_life.items()]),
            starved=starved,
        )
        self._signs_of_life.clear()
        self._hub.post("progress", pulse)

    def _pids(self, members: Iterable[Member]) -> dict[Member, int]:
        found = {member: facts.pid for member in members if (facts := self._facts.get(member))}
        return {member: pid for member, pid in found.items() if pid is not None}

    # What the hub calls

    def at_once(self, effects: Sequence[Suspect]) -> None:
        pass

    def perform(self, event: Pulse, effects: Sequence[Suspect]) -> None:
        for effect in effects:
            self._suspect(effect.member, LossCause.HANG, effect.reason)


def _beat(member: Member, sign: Heartbeat | StepReport) -> MemberBeat:
    if isinstance(sign, Heartbeat):
        return MemberBeat(member, sign.operations, sign.cpu_ms, sign.waiting_for, sign.parked)
    return MemberBeat(member, sign.operations, sign.cpu_ms, waiting_for=None, parked=False)
