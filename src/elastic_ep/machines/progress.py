"""The watch over progress: finds the rank that hangs, and never one that is only busy.

A killed process is noticed by the kernel. A stopped or stuck one never dies, so it must be found by what it does
not do: it sends no heartbeat, or everybody waits for it while it waits for nobody and burns no processor time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from elastic_ep.messages import Heartbeat, Member


@dataclass(frozen=True, slots=True)
class ProgressConfig:
    """`deadline_ms` from the hang to the verdict; a rank that still burns processor time gets `busy_factor` times it."""

    deadline_ms: int = 1_000
    busy_factor: int = 30
    idle_factor: int = 5


@dataclass(frozen=True, slots=True)
class Pulse:
    """What came in since the last pulse. `seated` are the view's members, `starting` those on their way."""

    now_ms: int
    seated: tuple[Member, ...]
    starting: tuple[Member, ...]
    beats: tuple[Heartbeat, ...]


@dataclass(frozen=True, slots=True)
class Suspect:
    """This member hangs: fence it."""

    member: Member
    reason: str


@dataclass
class _Seen:
    beat: Heartbeat | None
    heard_ms: int
    moved_ms: int
    """When its operations last grew."""
    idle_ms: int
    """When its processor time last grew."""


@dataclass(eq=False)
class ProgressMachine:
    config: ProgressConfig = field(default_factory=ProgressConfig)
    transient: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        self.seen: dict[Member, _Seen] = {}
        self.suspected: set[Member] = set()
        self.now_ms: int | None = None

    def step(self, event: Pulse) -> list[Suspect]:
        self._forgive_own_absence(event.now_ms)
        self._take_in(event)
        seated = [member for member in event.seated if member not in self.suspected]
        found = self._silent(event) or self._stuck(seated, alone=len(event.seated) == 1)
        self.suspected.update(suspect.member for suspect in found)
        return found

    def check(self) -> None:
        assert all(seen.heard_ms <= (self.now_ms or 0) for seen in self.seen.values())

    def _forgive_own_absence(self, now_ms: int) -> None:
        """If this process itself was held up, the silence of the others proves nothing."""
        gap = now_ms - self.now_ms if self.now_ms is not None else 0
        if gap > self.config.deadline_ms // 2:
            for seen in self.seen.values():
                seen.heard_ms = min(seen.heard_ms + gap, now_ms)
                seen.moved_ms = min(seen.moved_ms + gap, now_ms)
                seen.idle_ms = min(seen.idle_ms + gap, now_ms)
        self.now_ms = now_ms

    def _take_in(self, event: Pulse) -> None:
        alive = {*event.seated, *event.starting}
        self.seen = {member: seen for member, seen in self.seen.items() if member in alive}
        self.suspected &= alive
        now = event.now_ms
        for member in alive - self.seen.keys():
            self.seen[member] = _Seen(None, now, now, now)
        for beat in event.beats:
            seen = self.seen.get(Member(beat.rank, beat.incarnation))
            if seen is None:
                continue
            before, seen.beat, seen.heard_ms = seen.beat, beat, now
            if before is None or beat.operations != before.operations or beat.parked:
                seen.moved_ms = seen.idle_ms = now
            elif beat.cpu_ms > before.cpu_ms:
                seen.idle_ms = now
        for member in event.starting:  # nothing is expected of it before it has its seat
            self.seen[member].moved_ms = self.seen[member].idle_ms = now

    def _silent(self, event: Pulse) -> list[Suspect]:
        found = []
        for member, seen in self.seen.items():
            if member in self.suspected or (seen.beat is None and member in event.starting):
                continue  # before its first heartbeat a rank has its own, longer deadline
            calm = member in event.starting or (seen.beat is not None and seen.beat.parked)
            limit = self.config.deadline_ms * (self.config.idle_factor if calm else 1) * 3 // 4
            silence = event.now_ms - seen.heard_ms
            if silence >= limit:
                found.append(Suspect(member, f"hang: no sign of life for {silence / 1000:.1f} s"))
        return found

    def _stuck(self, seated: list[Member], *, alone: bool) -> list[Suspect]:
        now = self.now_ms or 0
        running = [m for m in seated if (beat := self.seen[m].beat) is not None and not beat.parked]
        still = min((now - self.seen[member].moved_ms for member in running), default=0)
        if still < self.config.deadline_ms * 3 // 4:
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
