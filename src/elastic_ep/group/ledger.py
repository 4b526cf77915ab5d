"""What operators are told of losses: a line in the log for each, its cause in the metrics, and each rank's last one.

A loss is the end of an incarnation that was not asked to end, whether it served or was still starting. Its line waits
until the cause is known, which the exit status says, and for a moment until survivors have said how long they stalled.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime

import structlog

from elastic_ep.event_log.log import EventLog
from elastic_ep.group.history import History
from elastic_ep.group.metrics import Metrics
from elastic_ep.group.pace import Disturbance
from elastic_ep.group.port import LastLoss, Loss, LossCause
from elastic_ep.machines.membership.relaunch import CRASH_SIGNALS, HOST_LOST
from elastic_ep.machines.rank.lifecycle import SEATED
from elastic_ep.wire.messages import Member, RankState
from elastic_ep.wire.privacy import masked

STALL_S = 2.0
"""So long a loss's line waits at most for what survivors felt of it; what they say later gets a line of its own."""
LAUNCH_FAILED = "launch failed: "
_VERDICT = -1
"""Among the survivors that a line waits for: whether all ranks fail to start alike, which is said for all at once."""
log = structlog.get_logger()


@dataclass
class _Loss:
    member: Member
    state: RankState
    """In which it was lost."""
    at: datetime
    at_s: float
    epoch: int | None = None
    """Of the first view without it."""
    cause: LossCause | None = None
    why: str = ""
    requests: int = 0
    taken_over_by: str = ""
    awaited: set[int] = field(default_factory=set)
    """Survivors that have not said yet what they felt."""
    late: set[int] = field(default_factory=set)
    """Those that the line has not waited for."""
    stall_s: float | None = None
    again_in_s: float | None = 0.0
    back: Member | None = None
    """The next incarnation that served."""
    back_after_s: float | None = None
    away_s: float = 0.0
    """The same, but from the first of several losses in a row on."""

    def public(self) -> LastLoss:
        return LastLoss(
            incarnation=self.member.incarnation,
            at=self.at.isoformat(timespec="milliseconds"),
            state=self.state,
            cause=self.cause or LossCause.UNKNOWN,
            why=self.why,
            requests=self.requests,
            stall_s=_rounded(self.stall_s),
            back_after_s=_rounded(self.back_after_s),
        )

    def shown(self) -> Loss:
        """Without what a client has sent, which a rank's own words may quote."""
        its_own_words = self.cause in (LossCause.EXCEPTION, LossCause.PROTOCOL)
        return Loss(
            rank=self.member.rank,
            incarnation=self.member.incarnation,
            at_ms=round(self.at.timestamp() * 1000),
            at_ns=round(self.at_s * 1e9),
            state=self.state,
            cause=self.cause or "",
            why=masked(self.why) if its_own_words else self.why,
            requests=self.requests,
            taken_over_by=self.taken_over_by,
            stall_s=_rounded(self.stall_s),
            back_after_s=_rounded(self.back_after_s),
        )


class Ledger:
    """Of one run; on the event loop. Causes go into the event log, too, and what is known of losses into `history`."""

    def __init__(self, metrics: Metrics, log: EventLog, history: History) -> None:
        self._metrics = metrics
        self._log = log
        self._history = history
        self._loop = asyncio.get_running_loop()
        self._began_s = time.monotonic()
        self._states: dict[int, RankState] = {}
        self._blamed: dict[Member, tuple[LossCause, str]] = {}
        self._fenced: set[Member] = set()
        self._last: dict[int, _Loss] = {}
        self._untold: list[_Loss] = []
        self._away_since_s: dict[int, float] = {}
        self._anybody_served = False
        self._start_failed = False

    def last(self, rank: int) -> LastLoss | None:
        """It stays when the rank is back."""
        loss = self._last.get(rank)
        return loss.public() if loss else None

    def moved(self, member: Member, state: RankState) -> None:
        """The member is in `state` now; for losses there is `lost`."""
        before = self._states.get(member.rank)
        self._states[member.rank] = state
        log.debug("rank state", rank=str(member), state=state.value)
        if state is RankState.SERVING and before is not RankState.DRAINING:
            self._serves(member)

    def blame(self, member: Member, cause: LossCause, why: str) -> None:
        """Why the member will be fenced or is about to end; the first to say so is believed."""
        self._blamed.setdefault(member, (cause, why))

    def fenced(self, member: Member, why: str) -> None:
        """It is being killed; said again and again, perhaps. Without a blame it has missed a deadline."""
        self.blame(member, LossCause.TIMEOUT, why)
        if member not in self._fenced:
            self._fenced.add(member)
            says_so_itself = self._blamed[member][0] is LossCause.EXCEPTION
            (log.debug if says_so_itself else log.warning)("rank fenced", rank=str(member), why=why)

    def lost(self, member: Member) -> None:
        """The member is dead, or surely dying, and nobody asked it to end."""
        state = self._states.get(member.rank, RankState.LAUNCHING)
        loss = _Loss(member, state, datetime.now(UTC), time.monotonic())
        if state in SEATED:
            self._away_since_s[member.rank] = loss.at_s
        for other in self._untold:
            other.awaited.discard(member.rank)
        if not self._anybody_served:
            loss.awaited = {_VERDICT}
            self._loop.call_later(STALL_S, self._patience_over, loss)
        self._states[member.rank] = RankState.FAILED
        self._last[member.rank] = loss
        self._untold.append(loss)
        self._history.lost(loss.shown)

    def left_view(self, epoch: int, survivors: Collection[int]) -> None:
        """View `epoch` lacks those lost last; `survivors` have work, and will feel it."""
        for loss in self._untold:
            if loss.epoch is None and loss.state in SEATED:
                loss.epoch, loss.awaited = epoch, set(survivors)
                self._loop.call_later(STALL_S, self._patience_over, loss)

    def taken_over(self, member: Member, by: Mapping[Member | None, int]) -> None:
        """How many of the lost member's requests went on where; None: they wait, or have failed."""
        loss = self._last.get(member.rank)
        if loss is not None and loss.member == member:
            loss.requests = sum(by.values())
            shown = sorted((str(other) if other else "nobody yet", count) for other, count in by.items())
            loss.taken_over_by = ", ".join(f"{other}: {count}" for other, count in shown)
            self._history.loss_changed()

    def disturbed(self, seen: Disturbance) -> None:
        if seen.kind != "loss":
            return
        for loss in self._last.values():
            if loss.epoch == seen.epoch:
                loss.stall_s = max(loss.stall_s or 0.0, seen.beyond_s)
                loss.awaited.discard(seen.rank)
                self._history.loss_changed()
                if seen.rank in loss.late:
                    loss.late.discard(seen.rank)
                    if not loss.late:
                        log.info("survivors stalled", rank=str(loss.member), by=_stall(loss.stall_s))
        self._tell_what_is_known()

    def gone(self, member: Member, status: str, again_in_s: float | None) -> None:
        """Nothing of the process is left. `again_in_s`: when the rank is launched again; None: never."""
        cause, why = self._blamed[member] if member in self._blamed else cause_of(status)
        self._blamed.pop(member, None)
        self._fenced.discard(member)
        loss = next((loss for loss in self._untold if loss.member == member), None)
        if loss is None:
            return
        loss.cause, loss.why, loss.again_in_s = cause, why, again_in_s
        self._history.loss_changed()
        self._metrics.rank_lost(cause)
        says_so_itself = cause is LossCause.EXCEPTION  # and may quote a client's text
        self._log.note(
            "loss",
            rank=member.rank,
            incarnation=member.incarnation,
            cause=cause,
            why=masked(why) if says_so_itself and self._log.private else why,
            requests=loss.requests,
            taken_over_by=loss.taken_over_by,
        )
        self._tell_what_is_known()

    def start_failed(self) -> None:
        """Every rank has failed to start for the same reason, and whoever ends the run says it."""
        self._start_failed = True

    def close(self) -> None:
        """Tell what is left, known or not."""
        for loss in self._untold:
            self._tell(loss)
        self._untold.clear()

    # Lines

    def _serves(self, member: Member) -> None:
        self._anybody_served = True
        now = time.monotonic()
        away_s = now - self._away_since_s.pop(member.rank, self._began_s)
        loss = self._last.get(member.rank)
        if loss is None:
            log.info("rank serves", rank=str(member), after_s=_rounded(away_s))
            return
        loss.back, loss.back_after_s, loss.away_s = member, now - loss.at_s, away_s
        self._history.loss_changed()
        if loss not in self._untold:  # else its own line comes first
            self._tell_return(loss)

    def _patience_over(self, loss: _Loss) -> None:
        loss.late, loss.awaited = loss.awaited, set()
        self._tell_what_is_known()

    def _tell_what_is_known(self) -> None:
        for loss in list(self._untold):
            if loss.cause is not None and not loss.awaited:
                self._untold.remove(loss)
                self._tell(loss)

    def _tell(self, loss: _Loss) -> None:
        if self._start_failed:
            return
        facts: dict[str, object] = {"cause": (loss.cause or LossCause.UNKNOWN).value, "why": loss.why}
        if loss.state in SEATED:
            facts["requests"] = loss.requests
            if loss.requests:
                facts["taken_over_by"] = loss.taken_over_by
            if loss.stall_s is not None:
                facts["survivors_stalled"] = _stall(loss.stall_s)
            what = "rank lost"
        else:
            facts["state"] = loss.state.value
            what = "rank lost before it served"
        if loss.again_in_s is None:
            facts["relaunch"] = "never"
        elif loss.again_in_s:
            facts["relaunch"] = f"in {loss.again_in_s:.1f} s"
        log.warning(what, rank=str(loss.member), **facts)
        if loss.back is not None:
            self._tell_return(loss)

    def _tell_return(self, loss: _Loss) -> None:
        log.info("rank is back", rank=str(loss.back), away_s=_rounded(loss.away_s))


def cause_of(status: str) -> tuple[LossCause, str]:
    """What the end of a process that nobody here has blamed says: "signal 9", "exit status 1", ..."""
    if status.startswith("signal "):
        number = int(status.removeprefix("signal "))
        name = signal.Signals(number).name if number in set(signal.Signals) else "real-time"
        if number in CRASH_SIGNALS:
            return LossCause.CRASH, f"crashed by signal {number} ({name})"
        memory = ", perhaps by the kernel for want of memory" if number == signal.SIGKILL else ""
        return LossCause.KILLED, f"killed by signal {number} ({name}) from outside{memory}"
    if status.startswith("exit status "):
        return LossCause.EXIT, status
    if status.startswith(LAUNCH_FAILED):
        return LossCause.LAUNCH_FAILED, status.removeprefix(LAUNCH_FAILED)
    if status == HOST_LOST:
        return LossCause.HOST, status
    return LossCause.UNKNOWN, f"how it ended is not known ({status})"


def _stall(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms beyond a step"


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)
