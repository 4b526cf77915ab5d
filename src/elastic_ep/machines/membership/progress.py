"""The watch over progress: finds the rank that hangs, and never one that is only busy, starved or paused with all others.

A killed process is noticed by the kernel. A stopped or stuck one never dies, so it must be found by what it does
not do: it sends no heartbeat, or everybody waits for it while it waits for nobody and burns no processor time.

Silence proves something only while something else proves that the machine runs. So three things do not count:

* what the watcher itself was held up by: its pulses go by the time that it has lived (`lived_time.py`);
* time in which nobody at all was heard: then it is the machine, at least for a while;
* time that a rank's threads have spent waiting for a processor, as the kernel tells (`Pulse.starved`).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from elastic_ep.machines.machine import Machine
from elastic_ep.timing import ProgressConfig
from elastic_ep.wire.messages import Member


@dataclass(frozen=True, slots=True)
class Starved:
    """For so long of the time since the last pulse, threads of this member were ready to run and got no processor."""

    member: Member
    ms: int


class MemberBeat(NamedTuple):
    """A member's newest sign of life; the fields are those of `Heartbeat`."""

    member: Member
    operations: int
    cpu_ms: int
    waiting_for: int | None
    parked: bool


@dataclass(frozen=True, slots=True)
class Pulse:
    """What came in since the last pulse. `seated` are the view's members, `starting` those on their way.

    `now_ms` is lived time. `starved` need say something of those only that are in doubt.
    """

    now_ms: int
    seated: tuple[Member, ...]
    starting: tuple[Member, ...]
    beats: tuple[MemberBeat, ...]
    starved: tuple[Starved, ...] = ()


@dataclass(frozen=True, slots=True)
class Suspect:
    """This member hangs: fence it."""

    member: Member
    reason: str


@dataclass
class _Seen:
    beat: MemberBeat | None
    heard_ms: int
    moved_ms: int
    """When its operations last grew; later by what does not count."""
    idle_ms: int
    """When its processor time last grew."""
    excused_ms: int = 0
    """Of the time since it was last heard, what does not count."""
    starved_ms: int = 0
    """Of that, what it spent waiting for a processor."""


@dataclass(eq=False)
class ProgressMachine(Machine[Pulse, Suspect]):
    config: ProgressConfig = field(default_factory=ProgressConfig)

    def __post_init__(self) -> None:
        self.seen: dict[Member, _Seen] = {}
        self.suspected: set[Member] = set()
        self.now_ms: int | None = None
        self.anybody_ms = 0
        """When anybody was last heard."""

    def _step(self, event: Pulse) -> list[Suspect]:
        self._pass_time(event)
        self._take_in(event)
        seated = [member for member in event.seated if member not in self.suspected]
        found = self._silent(event) or self._stuck(seated, alone=len(event.seated) == 1)
        self.suspected.update(suspect.member for suspect in found)
        return found

    def doubtful(self) -> list[Member]:
        """Of whom the next pulse should say whether they are starved: silent or still for a third of what is allowed."""
        now = self.now_ms or 0
        return [
            member
            for member, seen in self.seen.items()
            if member not in self.suspected
            and now - min(seen.heard_ms, seen.moved_ms) > self.config.limit_ms // 3
        ]

    def _check(self) -> None:
        now = self.now_ms or 0
        for seen in self.seen.values():
            assert max(seen.heard_ms, seen.moved_ms, seen.idle_ms) <= now
            assert 0 <= seen.starved_ms <= seen.excused_ms <= now - seen.heard_ms

    def _pass_time(self, event: Pulse) -> None:
        """Of the time since the last pulse, let not count what proves nothing."""
        before = event.now_ms if self.now_ms is None else self.now_ms
        self.now_ms = event.now_ms
        starved = {each.member: each.ms for each in event.starved}
        common_ms = self._nobody_heard(before, event)
        for member, seen in self.seen.items():
            starved_ms = min(max(0, starved.get(member, 0)), event.now_ms - before)
            excused_ms = max(common_ms, starved_ms)
            seen.starved_ms += starved_ms
            seen.excused_ms += excused_ms
            seen.moved_ms += excused_ms

    def _nobody_heard(self, before: int, event: Pulse) -> int:
        """How long, since the last pulse, it had been too long that anybody was heard. A single rank has no peers."""
        if len(self.seen) < 2:
            return 0
        calm = all(self._calm(member, event) for member in self.seen)
        allowed_ms = self.config.common_pause_ms * (self.config.idle_factor if calm else 1)
        return max(0, event.now_ms - max(before, self.anybody_ms + allowed_ms))

    def _take_in(self, event: Pulse) -> None:
        alive = {*event.seated, *event.starting}
        self.seen = {member: seen for member, seen in self.seen.items() if member in alive}
        self.suspected &= alive
        now = event.now_ms
        for member in alive - self.seen.keys():
            self.seen[member] = _Seen(None, now, now, now)
            self.anybody_ms = now
        for beat in event.beats:
            seen = self.seen.get(beat.member)
            if seen is None:
                continue
            self.anybody_ms = now
            before, seen.beat, seen.heard_ms = seen.beat, beat, now
            seen.excused_ms = seen.starved_ms = 0
            if before is None or beat.operations != before.operations or beat.parked:
                seen.moved_ms = seen.idle_ms = now
            elif beat.cpu_ms > before.cpu_ms:
                seen.idle_ms = now
        for member in event.starting:  # nothing is expected of it before it has its seat
            self.seen[member].moved_ms = self.seen[member].idle_ms = now

    def _calm(self, member: Member, event: Pulse) -> bool:
        """Whether it may be silent for longer than others: it beats more seldom, or is held up by what it imports."""
        beat = self.seen[member].beat
        return member in event.starting or (beat is not None and beat.parked)

    def _silent(self, event: Pulse) -> list[Suspect]:
        found = []
        for member, seen in self.seen.items():
            if member in self.suspected or (seen.beat is None and member in event.starting):
                continue  # before its first heartbeat a rank has its own, longer deadline
            factor = self.config.idle_factor if self._calm(member, event) else 1
            limit = self.config.limit_ms * factor
            silence = event.now_ms - seen.heard_ms
            beside_others = silence - seen.excused_ms >= limit
            together = silence - seen.starved_ms >= limit * self.config.idle_factor
            if (
                beside_others
                or together
                or silence >= self.config.deadline_ms * self.config.busy_factor * factor
            ):
                found.append(Suspect(member, f"hang: no sign of life for {silence / 1000:.1f} s"))
        return found

    def _stuck(self, seated: list[Member], *, alone: bool) -> list[Suspect]:
        now = self.now_ms or 0
        running = [m for m in seated if (beat := self.seen[m].beat) is not None and not beat.parked]
        still = min((now - self.seen[member].moved_ms for member in running), default=0)
        if still < self.config.limit_ms:
            return []
        found = []
        for member in running if alone else self._waited_for(running):
            seen = self.seen[member]
            busy = now - seen.idle_ms < self.config.deadline_ms
            if not busy or still >= self.config.deadline_ms * self.config.busy_factor:
                reason = f"hang: the group waits for it, no progress for {still / 1000:.1f} s"
                found.append(Suspect(member, reason))
        return found

    def _waited_for(self, running: list[Member]) -> list[Member]:
        """Those whom somebody waits for and who themselves wait for nobody."""
        waiting_for = {member.rank: self._waits(member) for member in running}
        wanted = {rank for rank in waiting_for.values() if rank is not None}
        return [member for member in running if member.rank in wanted and waiting_for[member.rank] is None]

    def _waits(self, member: Member) -> int | None:
        beat = self.seen[member].beat
        return beat.waiting_for if beat else None
