"""The controller's shell: feeds the membership and progress machines and performs what they say.

Everything that they hear and answer goes into the event log, so that a run can be replayed.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import anyio
import structlog

from elastic_ep.event_log.log import EventLog
from elastic_ep.gateway.router import Router
from elastic_ep.group.group_lines import GroupLines
from elastic_ep.group.ledger import Ledger
from elastic_ep.group.metrics import Metrics
from elastic_ep.group.pace import Disturbance, PaceObserver
from elastic_ep.group.port import LossCause
from elastic_ep.group.repairs import Repairs
from elastic_ep.group.store_table import StoreTable
from elastic_ep.host.starvation import Starvation
from elastic_ep.machines.contract import Tick, UnexpectedEvent
from elastic_ep.machines.experts.repair import RepairMachine
from elastic_ep.machines.lived_time import LivedTime
from elastic_ep.machines.membership import events as ev
from elastic_ep.machines.membership.machine import MembershipMachine
from elastic_ep.machines.membership.outlook import Outlook
from elastic_ep.machines.membership.progress import ProgressMachine, Pulse
from elastic_ep.machines.requests import events as routing
from elastic_ep.timing import USUAL, Timing
from elastic_ep.wire.messages import (
    Beat,
    Commit,
    Drain,
    FromRank,
    Heartbeat,
    Hello,
    Member,
    Prepare,
    Promise,
    RankReport,
    RankState,
    RequestFailed,
    Snapshot,
    SnapshotRequest,
    StepReport,
    View,
)
from elastic_ep.wire.privacy import masked
from elastic_ep.wire.sockets import ControllerWire
from elastic_ep.wire.store_messages import StoreDelete, StoreGet, StoreSet

log = structlog.get_logger()
NOTED_PAUSE_MS = 500
"""Whoever reads the log is told when the watch over progress was held up for longer."""
_STARTING = (RankState.INIT_CUDA, RankState.INIT_DIST, RankState.JOINING)
_ENDED = (RankState.FAILED, RankState.STOPPED)
_TO_RANKS = (ev.Publish, ev.SendTo, ev.Fence, ev.Launch)


class Processes(Protocol):
    """What the controller needs of the launcher."""

    def launch(self, member: Member) -> None: ...

    def fence(self, member: Member) -> None: ...

    def watch(self, member: Member) -> None:
        """The rank holds its death mutex now."""

    def hold(self, member: Member) -> None:
        """The rank is starting, and may use more of its device by now."""

    def when_free(self, rank: int, then: Callable[[], None]) -> None:
        """Call `then`, now or when nothing of the rank's dead incarnations is on its device any more."""


@dataclass
class RankFacts:
    """What is known of a member besides its lifecycle."""

    pid: int | None = None
    running: int = 0
    waiting: int = 0
    step: int = 0
    kv_pages: int = 0
    """Of its KV cache, in use."""


@dataclass
class Controller:
    machine: MembershipMachine
    progress: ProgressMachine
    repair: RepairMachine
    processes: Processes
    wire: ControllerWire
    router: Router
    log: EventLog
    metrics: Metrics
    on_change: Callable[[], None]
    """Something that the operator sees has changed."""
    timing: Timing = USUAL
    paced: bool = True
    """Stalls are measured."""

    facts: dict[Member, RankFacts] = field(default_factory=dict)
    on_step: Callable[[int], None] = lambda _step: None
    """Told of every reported step's number."""

    def __post_init__(self) -> None:
        self._queue: deque[ev.Event] = deque()
        self._busy = False
        self._signs_of_life: dict[Member, Heartbeat | StepReport] = {}
        """Since the last pulse, the newest of each member."""
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._noticed_ns: dict[Member, int] = {}
        self._seated: frozenset[Member] = frozenset()
        self._lived = LivedTime()
        self._lost_ms = 0.0
        """What the watch over progress has noted of it."""
        self._starvation = Starvation()
        self.stopped = anyio.Event()
        self.serving = anyio.Event()
        self.over = anyio.Event()
        """The machine has given its verdict: nothing will serve any more."""
        self.pace = PaceObserver(self._disturbed, self.timing)
        self.ledger = Ledger(self.metrics, self._note_loss)
        self.lines = GroupLines(self.machine)
        self.store = StoreTable(self.wire.send, self.log.note)
        self.repairs = Repairs(
            self.repair,
            self.wire,
            self.log,
            self.metrics,
            on_placed=lambda *placed: self.feed(ev.Placed(*placed)),
            on_deadline=self._set_timer,
            now_ms=self.now_ms,
        )

    # In

    def feed(self, event: ev.Event) -> None:
        """Take one event; events that arise meanwhile wait their turn."""
        self._queue.append(event)
        if self._busy:
            return
        self._busy = True
        try:
            while self._queue:
                next_event = self._queue.popleft()
                now = Tick(self.now_ms())
                if now.now_ms > self.machine.now_ms and not isinstance(next_event, Tick):
                    self._step(now)
                self._step(next_event)
        finally:
            self._busy = False
        self._set_timer()
        self.on_change()

    def on_message(self, message: FromRank) -> None:
        """A valid message from a rank; news of an old incarnation is dropped by the machines.

        A rank that breaks the protocol is faulty, and no reason for the controller to fall over.
        """
        member = Member(message.rank, message.incarnation)
        if self.machine.slots.get(member.rank) is None:
            self.wire.dropped += 1
            return
        try:
            self._heard(member, message)
        except UnexpectedEvent as error:
            self._broke_protocol(member, error)

    def _heard(self, member: Member, message: FromRank) -> None:
        match message:
            case StepReport():
                self._on_step_report(member, message)
            case Heartbeat():
                self._signs_of_life[member] = message
                facts = self._known(member)
                facts.step, facts.kv_pages = message.step, message.kv_pages
                slot = self.machine.slots[member.rank]
                if slot.member == member and slot.state in _STARTING:
                    self.processes.hold(member)
            case Promise():
                self.feed(ev.Promised(member, message.attempt, message.step))
            case RankReport():
                self._on_rank_report(member, message)
            case SnapshotRequest():
                self._answer_snapshot(member)
            case Hello():
                self._known(member).pid = message.pid
                self.processes.watch(member)
            case RequestFailed():
                failed = (member, message.request_id, message.code, message.reason)
                log.warning(
                    "a request failed", rank=str(member), request=message.request_id, why=message.reason
                )
                self.router.handle(routing.Failed(*failed))
            case StoreSet() | StoreGet() | StoreDelete():
                self.store.heard(member, message)
            case _:
                self.repairs.heard(member, message)

    def on_protocol_error(self, member: Member | None, why: str) -> None:
        """What came is no message, or could not be sent. `member` is to blame, if it is known: it is fenced.

        What it had is computed elsewhere, so nothing is lost with the message.
        """
        log.error("protocol error", rank=None if member is None else str(member), why=why)
        if self.log.private:
            why = masked(why)
        self.log.note("protocol_error", member=member, why=why)
        slot = self.machine.slots.get(member.rank) if member else None
        if member is not None and slot is not None and slot.member == member:
            self.suspect(member, LossCause.PROTOCOL, f"protocol error: {why}")

    def suspect(self, member: Member, cause: LossCause, why: str) -> None:
        """The member is to be fenced."""
        self._blame(member, cause, why)
        self.feed(ev.Suspected(member, why))

    def on_launched(self, member: Member, pid: int) -> None:
        self._known(member).pid = pid
        self.feed(ev.ProcessStarted(member))

    def on_death(self, member: Member, cause: str, at_ns: int) -> None:
        """A death notice: `cause` says who noticed, `at_ns` when, CLOCK_MONOTONIC nanoseconds."""
        slot = self.machine.slots[member.rank]
        if slot.member == member and member not in self._noticed_ns:
            self._noticed_ns[member] = at_ns
            self.log.note(
                "death_notice", rank=member.rank, incarnation=member.incarnation, source=cause, at_ns=at_ns
            )
            self.feed(ev.StepSeen(self.step))
        self.feed(ev.DeathNoticed(member, "died"))

    def on_gone(self, member: Member, status: str) -> None:
        self.feed(ev.ProcessGone(member, status))
        self.ledger.gone(member, status, self._relaunch_in_s(member.rank))
        self.facts.pop(member, None)
        self.repairs.gone(member)
        self.store.gone(member)
        self._noticed_ns.pop(member, None)

    @property
    def step(self) -> int:
        """The step the group is in, as far as heard; while it is parked, the one that it goes on with."""
        return max([self.machine.view.park_at or 0, *(fact.step for fact in self.facts.values())])

    # For operators

    def outlook(self) -> Outlook:
        return self.machine.outlook(self.now_ms())

    def reason(self, rank: int) -> str:
        """Why a rank is not well."""
        return self.machine.reason(rank, self.now_ms())

    def relaunch(self, ranks: Iterable[int]) -> tuple[int, ...]:
        """Have those of `ranks` launched now that are dead; which ones. Those that run are left alone."""
        slots = self.machine.slots
        dead = tuple(rank for rank in ranks if slots[rank].fenced or slots[rank].state is RankState.FAILED)
        self.feed(ev.RelaunchRequested(dead))
        return dead

    # Loops

    async def beat(self) -> None:
        """Repeat the last number, so that a lost message is noticed."""
        while True:
            self.wire.publish(Beat())
            await anyio.sleep(self.timing.beat_ms / 1000 * self._calm)

    async def watch_progress(self) -> None:
        while True:
            pause_s = self.timing.pulse_ms / 1000 * self._calm
            self._lived.rest(_reading_ms(), pause_s * 1000)
            await anyio.sleep(pause_s)
            self._note_a_pause()
            self._pulse()

    def now_ms(self) -> int:
        """What all deadlines go by: while the watch over progress is held up, this clock stands still."""
        return int(self._lived.at(_reading_ms()))

    def _note_a_pause(self) -> None:
        self._lived.at(_reading_ms())
        held_up_ms, self._lost_ms = round(self._lived.lost_ms - self._lost_ms), self._lived.lost_ms
        if held_up_ms > NOTED_PAUSE_MS:
            self.log.note("held_up", ms=held_up_ms)
            log.warning(
                "the machine, or this process, stood still: no rank is judged by it", for_ms=held_up_ms
            )

    @property
    def _calm(self) -> int:
        """How much rarer things are checked while the group is parked."""
        return self.timing.calm_factor if self.machine.state is ev.GroupState.PAUSED else 1

    def _pulse(self) -> None:
        pulse = Pulse(
            now_ms=self.now_ms(),
            seated=tuple(sorted(self.machine.view.members)),
            starting=tuple(slot.member for slot in self.machine.slots.values() if slot.state in _STARTING),
            beats=tuple([_heartbeat(sign) for sign in self._signs_of_life.values()]),
            starved=self._starvation.sample(self._pids(self.progress.doubtful())),
        )
        self._signs_of_life.clear()
        suspects = self.progress.step(pulse)
        self.log.record("progress", pulse, suspects)
        for suspect in suspects:
            self.suspect(suspect.member, LossCause.HANG, suspect.reason)

    def _pids(self, members: Iterable[Member]) -> dict[Member, int]:
        found = {member: facts.pid for member in members if (facts := self.facts.get(member))}
        return {member: pid for member, pid in found.items() if pid is not None}

    # Out

    def _step(self, event: ev.Event) -> None:
        effects = self.machine.step(event)
        # What survivors wait for goes out before anything is written to disk.
        for effect in effects:
            if isinstance(effect, _TO_RANKS):
                self._tell_ranks(effect)
        self.log.record("membership", event, effects)
        for effect in effects:
            self._perform(effect)

    def _tell_ranks(self, effect: ev.Effect) -> None:
        match effect:
            case ev.Publish(body):
                self.wire.publish(body)
            case ev.SendTo(member, message):
                self.wire.send(member, message)
            case ev.Fence(member, _):
                self.processes.fence(member)
            case ev.Launch(member):
                self.processes.launch(member)

    def _perform(self, effect: ev.Effect) -> None:
        match effect:
            case ev.Publish(View() as view):
                self._view_changed(view, "loss")
            case ev.Publish(Commit(_, view)):
                self._view_changed(view, "gain")
            case ev.MemberUp(member):
                self.router.handle(routing.RankUp(member))
                self.repairs.proofs.ask([member])
            case ev.MemberDown(member, reason):
                self.ledger.taken_over(member, self.router.take_over(member, reason))
            case ev.RankMoved(member, state):
                self.metrics.rank_state(member.rank, state)
                if effect.is_loss:
                    self.ledger.lost(member)
                else:
                    self.ledger.moved(member, state)
                if state is RankState.DRAINING:
                    self.wire.send(member, Drain())
                    self.router.handle(routing.RankDraining(member))
            case ev.Fence(member, reason) if not self.machine.stopping:
                self.ledger.fenced(member, reason)
            case ev.GroupMoved(state):
                self.lines.moved(state)
                if state in (ev.GroupState.SERVING, ev.GroupState.DEGRADED, ev.GroupState.PAUSED):
                    self.serving.set()
            case ev.NothingWillServe(reason) | ev.StartFailed(reason):
                if isinstance(effect, ev.StartFailed):
                    self.ledger.start_failed()
                self.router.handle(ev.NothingWillServe(reason))
                self.over.set()
            case ev.AllStopped():
                self.stopped.set()

    def _view_changed(self, view: View, kind: str) -> None:
        self.metrics.epoch(view.epoch)
        if self._seated != view.members:
            self._seated = view.members
            self.pace.view_changed(view, kind)
            if kind == "loss":
                busy = self.router.running or self.router.waiting
                self.ledger.left_view(view.epoch, {seat.rank for seat in view.seats} if busy else ())
            self.repairs.members_changed(view.members)

    def _disturbed(self, seen: Disturbance) -> None:
        if seen.kind == "loss":
            self.metrics.failover_stall(seen.beyond_s)
        else:
            self.metrics.rejoin_pause(seen.beyond_s)
        self.ledger.disturbed(seen)
        self.log.note(
            "disturbance",
            kind=seen.kind,
            epoch=seen.epoch,
            rank=seen.rank,
            gap_s=round(seen.gap_s, 6),
            beyond_s=round(seen.beyond_s, 6),
            steps=round(seen.steps, 3),
        )

    def _on_rank_report(self, member: Member, report: RankReport) -> None:
        reported = ev.Reported(member, report.state, self._reason(member, report), report.suspects)
        if report.suspects:
            self.router.handle(routing.Blamed(member, report.suspects))
        if report.state is RankState.FAILED:
            self._blame(member, LossCause.EXCEPTION, self._reason(member, report))
        if report.state in _STARTING:
            self.processes.hold(member)
        if report.state is not RankState.JOINING:
            self.feed(reported)
            return

        def joining() -> None:
            slot = self.machine.slots[member.rank]
            if slot.member != member or slot.state is RankState.FAILED:
                return  # it died meanwhile
            try:
                self.feed(reported)
            except UnexpectedEvent as error:
                self._broke_protocol(member, error)

        self.processes.when_free(member.rank, joining)

    def _reason(self, member: Member, report: RankReport) -> str:
        """What a rank that has had requests says of its failure may quote them; its own line on stderr has it whole."""
        slot = self.machine.slots[member.rank]
        served = slot.member == member and slot.state in (RankState.SERVING, RankState.DRAINING)
        return masked(report.reason) if served and self.log.private else report.reason

    def _note_loss(self, kind: str, /, **facts: Any) -> None:
        if self.log.private and facts["cause"] is LossCause.EXCEPTION:
            facts["why"] = masked(facts["why"])
        self.log.note(kind, **facts)

    def _on_step_report(self, member: Member, report: StepReport) -> None:
        facts = self._known(member)
        facts.running, facts.waiting, facts.step = report.running, report.waiting, report.step
        facts.kv_pages = report.kv_pages
        self._signs_of_life[member] = report
        if report.masked:
            self.metrics.step_poisoned()
            times = {"ended_ns": report.ended_ns, "mask_ns": report.mask_ns}
            self.log.note("poisoned_step", rank=report.rank, step=report.step, masked=report.masked, **times)
            self._suspect(report)
        if self.paced:
            self.pace.step_reported(report)
        self.on_step(report.step)
        if report.tokens:
            committed = (member, report.tokens, report.step, report.started_ns, report.ended_ns)
            self.router.handle(routing.TokensCommitted(*committed))

    def _suspect(self, report: StepReport) -> None:
        """A rank that a step has masked in a view which has it: the wait for it was longer than a kernel waits.

        A report from an older view proves nothing: a loss was told by a newer one, and the next incarnation may be in.
        """
        view = self.machine.view
        if self.machine.stopping or report.epoch != view.epoch:
            return
        for seat in view.seats:
            if seat.rank in report.masked and seat.first_step <= report.step:
                self.suspect(seat.member, LossCause.HANG, f"rank {report.rank} waited for it in vain")

    def _answer_snapshot(self, member: Member) -> None:
        attempt = self.machine.attempt
        prepare = Prepare(attempt.number, tuple(sorted(attempt.joiners))) if attempt else None
        self.wire.publish(Beat())
        self.wire.send(member, Snapshot(self.wire.number, self.machine.view, prepare, self.repair.placement))

    def _broke_protocol(self, member: Member, error: UnexpectedEvent) -> None:
        self.suspect(member, LossCause.PROTOCOL, f"protocol error: {error}")

    def _blame(self, member: Member, cause: LossCause, why: str) -> None:
        slot = self.machine.slots[member.rank]
        if slot.member == member and slot.state not in _ENDED:
            self.ledger.blame(member, cause, why)

    def _relaunch_in_s(self, rank: int) -> float | None:
        slot = self.machine.slots[rank]
        if slot.away or self.machine.stopping:
            return None
        return max(0.0, ((slot.relaunch_at_ms or 0) - self.machine.now_ms) / 1000)

    def _known(self, member: Member) -> RankFacts:
        return self.facts.setdefault(member, RankFacts())

    def _set_timer(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None
        deadlines = (self.machine.next_deadline_ms(), self.repair.next_deadline_ms())
        deadline_ms = min([due for due in deadlines if due is not None], default=None)
        if deadline_ms is not None:
            delay = max(0.001, (deadline_ms - self.now_ms()) / 1000)
            self._timer = self._loop.call_later(delay, self._on_timer)

    def _on_timer(self) -> None:
        self.feed(Tick(self.now_ms()))
        self.repairs.feed(Tick(self.now_ms()))


def _reading_ms() -> float:
    return time.monotonic() * 1000


def _heartbeat(report: Heartbeat | StepReport) -> Heartbeat:
    """A rank that reports its steps sends no heartbeats: the reports are."""
    if isinstance(report, Heartbeat):
        return report
    return Heartbeat(
        report.rank,
        report.incarnation,
        step=report.step,
        operations=report.operations,
        cpu_ms=report.cpu_ms,
        waiting_for=None,
        parked=False,
    )
