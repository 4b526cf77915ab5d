"""Measures what a change of membership cost: from step reports, while serving.

A *stall* is the longest time between two committed steps of one survivor around a loss, a *pause* the same around a
gain; both less the survivor's median step, so zero means that nobody could have noticed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median

from elastic_ep.timing import Timing
from elastic_ep.wire.messages import Member, StepReport, View

_RECENT = 64
_WINDOW_STEPS = 8
"""Steps after a change in which the longest gap is looked for."""


@dataclass
class _Pace:
    last_ns: int
    gaps: deque[int] = field(default_factory=lambda: deque(maxlen=_RECENT))


@dataclass
class _Watch:
    kind: str
    epoch: int
    longest_ns: int = 0
    left: int = _WINDOW_STEPS


@dataclass(frozen=True, slots=True)
class Disturbance:
    """What one survivor felt of one change. Seconds; `steps` is the longest gap in median steps."""

    kind: str
    epoch: int
    rank: int
    gap_s: float
    beyond_s: float
    steps: float


class PaceObserver:
    def __init__(self, report: Callable[[Disturbance], None], timing: Timing) -> None:
        self._report = report
        self._quiet_ns = timing.quiet_ms * 1_000_000
        self._paces: dict[Member, _Pace] = {}
        self._watches: dict[Member, list[_Watch]] = {}

    def view_changed(self, view: View, kind: str) -> None:
        """`kind` is "loss", "leave" or "gain"."""
        self._paces = {member: pace for member, pace in self._paces.items() if member in view.members}
        self._watches = {member: self._watches.get(member, []) for member in self._paces}
        for watches in self._watches.values():
            watches.append(_Watch(kind, view.epoch))

    def step_reported(self, member: Member, report: StepReport) -> None:
        if not report.tokens:
            return
        pace = self._paces.get(member)
        if pace is None:
            self._paces[member] = _Pace(report.ended_ns)
            return
        gap = report.ended_ns - pace.last_ns
        pace.last_ns = report.ended_ns
        if gap > self._quiet_ns:
            self._watches.pop(member, None)
            return
        watches = self._watches.get(member)
        typical = median(pace.gaps) if watches and pace.gaps else gap
        for watch in watches or ():
            watch.longest_ns = max(watch.longest_ns, gap)
            watch.left -= 1
            if watch.left == 0:
                beyond = max(0.0, (watch.longest_ns - typical) / 1e9)
                steps = watch.longest_ns / typical if typical else 0.0
                self._report(
                    Disturbance(watch.kind, watch.epoch, member.rank, watch.longest_ns / 1e9, beyond, steps)
                )
        if watches:
            self._watches[member] = [watch for watch in watches if watch.left > 0]
        pace.gaps.append(gap)
