"""The shell of the membership and progress machines: what they hear of ranks and processes, and what they have done."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Protocol

import anyio
import structlog

from elastic_ep.event_log.log import EventLog
from elastic_ep.group.clock import Clock
from elastic_ep.group.history import GROUP, HOST, History
from elastic_ep.group.hub import Hub
from elastic_ep.group.ledger import LAUNCH_FAILED, Ledger
from elastic_ep.group.metrics import Metrics
from elastic_ep.group.pace import Disturbance, PaceObserver
from elastic_ep.group.port import LossCause
from elastic_ep.group.repairs import Repairs
from elastic_ep.group.serving_log import ServingLog
from elastic_ep.group.store_table import StoreTable
from elastic_ep.group.watch import COMING_UP, ProgressWatch, RankFacts
from elastic_ep.machines.contract import UnexpectedEvent
from elastic_ep.machines.membership import events as ev
from elastic_ep.machines.membership.machine import MembershipMachine
from elastic_ep.machines.membership.outlook import Outlook
from elastic_ep.machines.membership.progress import ProgressMachine, Starved
from elastic_ep.machines.rank.lifecycle import SEATED
from elastic_ep.machines.requests import events as routing
from elastic_ep.machines.requests.routing import RoutingMachine
from elastic_ep.placement import Placement
from elastic_ep.timing import USUAL, Timing
from elastic_ep.wire.host_messages import (
    AgentLost,
    AgentReady,
    Died,
    HostEvent,
    HostLost,
    HostUp,
    Launched,
    LaunchFailed,
    Reaped,
    ServerLost,
    ServerReady,
)
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
from elastic_ep.wire.slot_messages import PeerWeights
from elastic_ep.wire.sockets import ControllerWire
from elastic_ep.wire.store_messages import StoreDelete, StoreGet, StoreSet

log = structlog.get_logger()
_ENDED = (RankState.FAILED, RankState.STOPPED)


class Processes(Protocol):
    """What the controller needs of the ranks' processes."""

    def launch(self, member: Member, placement: Placement, peers: PeerWeights | None) -> None:
        """`peers`: whose weights it can read; None: nobody's."""

    def fence(self, member: Member) -> None: ...

    def watch(self, member: Member) -> None:
        """The rank holds its death mutex now."""

    def hear(self) -> None:
        """Have told what agents have said by now."""

    async def starved(self, pids: Mapping[Member, int]) -> tuple[Starved, ...]:
        """Who of these waited for a processor since the call before. May be cancelled."""
        ...

    def keep_device(self, member: Member, pid: int) -> None:
        """The rank is starting, and may use more of its device by now."""

    def gone(self, member: Member) -> None:
        """Nothing of it is left but what may still run on its device."""

    def when_free(self, rank: int, then: Callable[[], None]) -> None:
        """Call `then`, now or when nothing of the rank's dead incarnations is on its device any more."""


class Controller:
    """`on_step` hears the number of each reported step. `paced`: stalls are measured."""

    def __init__(
        self,
        hub: Hub,
        clock: Clock,
        machine: MembershipMachine,
        progress: ProgressMachine,
        requests: RoutingMachine,
        repairs: Repairs,
        processes: Processes,
        wire: ControllerWire,
        log: EventLog,
        metrics: Metrics,
        on_step: Callable[[int], None],
        timing: Timing = USUAL,
        paced: bool = True,
    ) -> None:
        self.machine = machine
        self.repairs = repairs
        self.history = History()
        self.ledger = Ledger(metrics, log, self.history)
        self.facts: dict[Member, RankFacts] = {}
        self.serving = anyio.Event()
        self.stopped = anyio.Event()
        self.drained = anyio.Event()
        """No request is left, and none comes any more."""
        self.over = anyio.Event()
        """The machine has given its verdict: nothing will serve any more."""
        self._settled = anyio.Event()
        """Set unless ranks leave, or are on their way back."""
        self._hub = hub
        self._clock = clock
        self._requests = requests
        self._processes = processes
        self._wire = wire
        self._log = log
        self._metrics = metrics
        self._on_step = on_step
        self.timing = timing
        self._paced = paced
        self._store = StoreTable(wire.send, log.note)
        self._pace = PaceObserver(self._disturbed, timing)
        self._lines = ServingLog(machine)
        self._noticed_ns: dict[Member, int] = {}
        self._seated: frozenset[Member] = frozenset()
        hub.attach("membership", machine, self)
        self.watch = ProgressWatch(
            hub, clock, machine, progress, self.facts, log, timing, self.suspect, processes.starved
        )

    # In

    def feed(self, event: ev.Event) -> None:
        self._hub.post("membership", event)

    def on_message(self, member: Member, message: FromRank) -> None:
        """A valid message from a rank; news of an old incarnation is dropped by the machines.

        A rank that breaks the protocol is faulty, and no reason for the controller to fall over.
        """
        if self.machine.records.get(member.rank) is None:
            self._wire.dropped += 1
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
                self.watch.heard(member, message)
                facts = self._known(member)
                facts.step, facts.pages = message.step, message.pages
                record = self.machine.records[member.rank]
                if record.member == member and record.state in COMING_UP:
                    self._keep_device(member)
            case Promise():
                self.feed(ev.Promised(member, message.attempt, message.step))
            case RankReport():
                self._on_rank_report(member, message)
            case SnapshotRequest():
                self._answer_snapshot(member)
            case Hello():
                self._known(member).pid = message.pid
                self._processes.watch(member)
            case RequestFailed():
                failed = (member, message.request_id, message.code, message.reason)
                log.warning(
                    "a request failed", rank=str(member), request=message.request_id, why=message.reason
                )
                self._hub.post("routing", routing.Failed(*failed))
            case StoreSet() | StoreGet() | StoreDelete():
                self._store.heard(member, message)
            case _:
                self.repairs.heard(member, message)

    def on_protocol_error(self, member: Member | None, why: str) -> None:
        """What came is no message, or could not be sent. `member` is to blame, if it is known: it is fenced.

        What it had is computed elsewhere, so nothing is lost with the message.
        """
        log.error("protocol error", rank=None if member is None else str(member), why=why)
        if self._log.private:
            why = masked(why)
        self._log.note("protocol_error", member=member, why=why)
        record = self.machine.records.get(member.rank) if member else None
        if member is not None and record is not None and record.member == member:
            self.suspect(member, LossCause.PROTOCOL, f"protocol error: {why}")

    def on_connection_ended(self, member: Member) -> None:
        """Of a rank on another host. Mostly because the rank has, or its host is lost: then that is said in time."""
        asyncio.get_running_loop().call_later(self.timing.host_silent_ms / 1000, self._cut_off, member)

    def _cut_off(self, member: Member) -> None:
        """HAZARD: what it was told meanwhile may be lost, a request too, whether or not it is connected again."""
        if member.rank in self.machine.records:
            self.suspect(member, LossCause.PROTOCOL, "its connection to the controller ended")

    def suspect(self, member: Member, cause: LossCause, why: str) -> None:
        """The member is to be fenced."""
        self._blame(member, cause, why)
        self.feed(ev.Suspected(member, why))

    def on_process(self, event: HostEvent) -> None:
        """What became of a rank's process, of the host's agent, or of the fork server."""
        match event:
            case Launched(member, pid):
                self._known(member).pid = pid
                self.feed(ev.ProcessStarted(member))
            case Died(member, cause, at_ns):
                self.on_death(member, cause, at_ns)
            case Reaped(member, status, _):
                self._processes.gone(member)
                self.on_gone(member, status)
            case LaunchFailed(member, reason):
                self.on_gone(member, f"{LAUNCH_FAILED}{reason}")
            case HostUp(host, name, rejoined):
                self._log.note("host_up", host=host, name=name, rejoined=rejoined)
                log.info("a host is in the group", host=host, address=name, again=rejoined > 0)
                there = tuple(rank for rank, at in enumerate(self.repairs.placement.hosts) if at == host)
                self.feed(ev.Grown(there))
                self.relaunch(rank for rank in there if rank in self.machine.records)
            case HostLost(host, members, why):
                self._on_host_lost(host, members, why)
            case AgentReady(pid, adopted):
                self._log.note("host_agent_ready", pid=pid, adopted=adopted)
            case AgentLost(pid, status):
                self._log.note("host_agent_lost", pid=pid, status=status)
            case ServerReady(pid, threads):
                self._log.note("fork_server_ready", pid=pid, threads=threads)
                self.history.moved(HOST, 0, "Ready")
            case ServerLost(pid, status):
                self._log.note("fork_server_lost", pid=pid, status=status)
                self.history.moved(HOST, 0, "Lost")
                if not self.machine.stopping:
                    log.warning(
                        "the fork server has died; ranks live on, another one is started", status=status
                    )

    def on_death(self, member: Member, cause: str, at_ns: int) -> None:
        """A death notice: `cause` says who noticed, `at_ns` when, CLOCK_MONOTONIC nanoseconds."""
        record = self.machine.records[member.rank]
        if record.member == member and member not in self._noticed_ns:
            self._noticed_ns[member] = at_ns
            self._log.note(
                "death_notice", rank=member.rank, incarnation=member.incarnation, source=cause, at_ns=at_ns
            )
            self.feed(ev.StepSeen(self.step))
        self.feed(ev.DeathNoticed(member, "died"))

    def _on_host_lost(self, host: int, members: tuple[Member, ...], why: str) -> None:
        at_ns = time.monotonic_ns()
        self._log.note("host_lost", host=host, ranks=[member.rank for member in members], why=why)
        if not self.machine.stopping:
            log.warning("a host is lost", host=host, ranks=[member.rank for member in members], why=why)
        for member in members:
            self._noticed_ns.setdefault(member, at_ns)
        self.feed(ev.StepSeen(self.step))
        self.feed(ev.HostLost(members, f"host {host} is lost: {why}"))

    def on_gone(self, member: Member, status: str) -> None:
        self.feed(ev.ProcessGone(member, status))
        self.ledger.gone(member, status, self._relaunch_in_s(member.rank))
        if facts := self.facts.pop(member, None):
            self._metrics.pages(member, facts.pages)
        self.repairs.gone(member)
        self._store.gone(member)
        self._noticed_ns.pop(member, None)

    @property
    def dropped(self) -> int:
        """Messages from ranks that were not heard."""
        return self._wire.dropped

    @property
    def step(self) -> int:
        """The step the group is in, as far as heard; while it is parked, the one that it goes on with."""
        return max([self.machine.view.park_at or 0, *(fact.step for fact in self.facts.values())])

    # For operators

    def outlook(self) -> Outlook:
        return self.machine.outlook(self._clock.now_ms())

    def reason(self, rank: int) -> str:
        """Why a rank is not well."""
        return self.machine.reason(rank, self._clock.now_ms())

    def relaunch(self, ranks: Iterable[int]) -> tuple[int, ...]:
        """Have those of `ranks` launched now that are dead; which ones. Those that run are left alone."""
        records = self.machine.records
        dead = tuple(
            rank for rank in ranks if records[rank].fenced or records[rank].state is RankState.FAILED
        )
        self.feed(ev.RelaunchRequested(dead))
        return dead

    def retire(self, ranks: Iterable[int], patience_s: float) -> None:
        """Have these ranks leave, and stay away. Their requests may end within `patience_s`, and then go on elsewhere."""
        self.feed(ev.RetireRequested(tuple(sorted(ranks)), round(patience_s * 1000)))

    def take_back(self, ranks: Iterable[int]) -> None:
        """Have these retired ranks in the group again."""
        self.feed(ev.ReturnRequested(tuple(sorted(ranks))))

    async def settled(self) -> None:
        """Wait until no rank leaves, and none that was taken back is on its way. Without a deadline."""
        await self._settled.wait()

    def kill(self, member: Member) -> bool:
        """Have the member killed; False: it is gone, or is being killed already."""
        record = self.machine.records[member.rank]
        if record.member != member or record.over or record.fenced:
            return False
        self.suspect(member, LossCause.KILLED, "killed by an operator")
        return True

    # Loops

    async def beat(self) -> None:
        """Repeat the last number, so that a lost message is noticed."""
        while True:
            self._wire.publish(Beat())
            await anyio.sleep(self.watch.calm * self.timing.beat_ms / 1000)

    # What the hub calls

    def at_once(self, effects: Sequence[ev.Effect]) -> None:
        """Survivors wait for it."""
        for effect in effects:
            match effect:
                case ev.Publish(body):
                    self._wire.publish(body)
                case ev.SendTo(member, message):
                    self._wire.send(member, message)
                case ev.Fence(member, _):
                    self._processes.fence(member)
                case ev.Launch(member):
                    peers = self.repairs.peer_weights(self.machine.view.members)
                    self._processes.launch(member, self.repairs.placement, peers)

    def perform(self, event: ev.Event, effects: Sequence[ev.Effect]) -> None:
        # Streams wait for a lost rank's requests to be given out: what else comes of a loss is posted after that.
        for effect in sorted(effects, key=lambda effect: not isinstance(effect, ev.MemberDown)):
            self._perform(effect)
        if not self.machine.scaling:
            self._settled.set()
        elif self._settled.is_set():
            self._settled = anyio.Event()

    def _perform(self, effect: ev.Effect) -> None:
        match effect:
            case ev.Publish(View() as view):
                self._view_changed(view, "leave" if set(view.left) & self._seated else "loss")
            case ev.Publish(Commit(_, view)):
                self._view_changed(view, "gain")
            case ev.MemberUp(member):
                self._hub.post("routing", routing.RankUp(member, self._known(member).pages.total))
                self.repairs.audit.ask([member])
            case ev.MemberDown(member, reason, left):
                self._hub.post("routing", routing.RankDown(member, reason, left))
                if left:
                    log.info("rank has left", rank=str(member), why="an operator wants it away")
            case ev.MemberResumed(member, why):
                self._hub.post("routing", routing.RankResumed(member))
                self._tell_repairs()
                (log.warning if why else log.info)("rank stays after all", rank=str(member), why=why)
            case ev.RankMoved(member, state):
                self._metrics.rank_state(member.rank, state)
                self.history.moved(*member, state)
                if effect.is_loss:
                    self.ledger.lost(member)
                else:
                    self.ledger.moved(member, state)
                if state is RankState.DRAINING:
                    self._wire.send(member, Drain())
                    self._hub.post("routing", routing.RankDraining(member))
                    if not self.machine.stopping:
                        log.info("rank drains", rank=str(member))
                        self._tell_repairs()
            case ev.Fence(member, reason) if not self.machine.stopping:
                self.ledger.fenced(member, reason)
            case ev.GroupMoved(state):
                self._lines.moved(state)
                self.history.moved(GROUP, 0, self.machine.public_state)
                if state in (ev.GroupState.SERVING, ev.GroupState.DEGRADED, ev.GroupState.PAUSED):
                    self.serving.set()
            case ev.NothingWillServe(reason) | ev.StartFailed(reason):
                if isinstance(effect, ev.StartFailed):
                    self.ledger.start_failed()
                self._hub.post("routing", ev.NothingWillServe(reason))
                self.over.set()
            case ev.AllStopped():
                self.stopped.set()

    def on_notice(self, notice: routing.Notice) -> None:
        """What becomes of requests, as far as it concerns the group."""
        match notice:
            case routing.WorkBegan() | routing.WorkEnded() | routing.RankDrained():
                self.feed(notice)
            case routing.Drained():
                self.drained.set()
            case routing.Fault(member, reason):
                self.suspect(member, LossCause.PROTOCOL, f"protocol error: {reason}")
            case routing.Replayed():
                self._metrics.replayed.inc()
            case routing.Moved():
                self._metrics.moved.inc()

    def _view_changed(self, view: View, kind: str) -> None:
        self._metrics.epoch.set(view.epoch)
        if self._seated != view.members:
            self._seated = view.members
            self._pace.view_changed(view, kind)
            if kind == "loss":
                busy = self._requests.requests
                self.ledger.left_view(view.epoch, {seat.rank for seat in view.seats} if busy else ())
            self._tell_repairs()

    def _tell_repairs(self) -> None:
        seats, leaving = self.machine.view.seats, self.machine.leaving
        leavers = [seat.member for seat in seats if seat.rank in leaving]
        self.repairs.members_changed(self.machine.view.members, leavers)

    def _disturbed(self, seen: Disturbance) -> None:
        if seen.kind == "loss":
            self._metrics.failover_stall.observe(seen.beyond_s)
        elif seen.kind == "gain":
            self._metrics.rejoin_pause.observe(seen.beyond_s)
        self.ledger.disturbed(seen)
        self._log.note(
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
            self._hub.post("routing", routing.Blamed(member, report.suspects))
        if report.state is RankState.FAILED:
            self._blame(member, LossCause.EXCEPTION, self._reason(member, report))
        if report.state in COMING_UP:
            self._keep_device(member)
        if report.num_pages:
            facts = self._known(member)
            facts.pages = facts.pages._replace(total=report.num_pages)
        if report.state is not RankState.JOINING:
            self.feed(reported)
            return

        def joining() -> None:
            record = self.machine.records[member.rank]
            if record.member != member or record.state is RankState.FAILED:
                return  # it died meanwhile
            try:
                self.feed(reported)
            except UnexpectedEvent as error:
                self._broke_protocol(member, error)

        self._processes.when_free(member.rank, joining)

    def _reason(self, member: Member, report: RankReport) -> str:
        """What a rank that has had requests says of its failure may quote them; its own line on stderr has it whole."""
        record = self.machine.records[member.rank]
        served = record.member == member and record.state in SEATED
        return masked(report.reason) if served and self._log.private else report.reason

    def _on_step_report(self, member: Member, report: StepReport) -> None:
        facts = self._known(member)
        facts.running, facts.waiting, facts.step = report.running, report.waiting, report.step
        facts.pages = report.pages
        self.watch.heard(member, report)
        if report.masked:
            self._metrics.poisoned_steps.inc()
            times = {"ended_ns": report.ended_ns, "mask_ns": report.mask_ns}
            self._log.note("poisoned_step", rank=member.rank, step=report.step, masked=report.masked, **times)
            self._suspect(member, report)
        if self._paced:
            self._pace.step_reported(member, report)
        self._on_step(report.step)
        if report.tokens or report.held is not None:
            step = (report.step, report.started_ns, report.ended_ns)
            committed = routing.TokensCommitted(member, report.tokens, *step, report.cached, report.held)
            self._hub.post("routing", committed)

    def _suspect(self, waiter: Member, report: StepReport) -> None:
        """A rank that a step has masked in a view which has it: the wait for it was longer than a kernel waits.

        A report from an older view proves nothing: a loss was told by a newer one, and the next incarnation may be in.
        """
        # Of a death survivors hear at the same time: it comes first, and then there is nobody to suspect.
        self._processes.hear()
        view = self.machine.view
        if self.machine.stopping or report.epoch != view.epoch:
            return
        for seat in view.seats:
            if seat.rank in report.masked and seat.first_step <= report.step:
                self.suspect(seat.member, LossCause.HANG, f"rank {waiter.rank} waited for it in vain")

    def _answer_snapshot(self, member: Member) -> None:
        attempt = self.machine.attempt
        prepare = Prepare(attempt.number, tuple(sorted(attempt.joiners))) if attempt else None
        self._wire.publish(Beat())
        self._wire.send(
            member, Snapshot(self._wire.number, self.machine.view, prepare, self.repairs.placement)
        )

    def _broke_protocol(self, member: Member, error: UnexpectedEvent) -> None:
        self.suspect(member, LossCause.PROTOCOL, f"protocol error: {error}")

    def _blame(self, member: Member, cause: LossCause, why: str) -> None:
        record = self.machine.records[member.rank]
        if record.member == member and record.state not in _ENDED:
            self.ledger.blame(member, cause, why)

    def _relaunch_in_s(self, rank: int) -> float | None:
        record = self.machine.records[rank]
        if record.away or self.machine.stopping or rank in self.machine.retired:
            return None
        return max(0.0, ((record.relaunch_at_ms or 0) - self.machine.now_ms) / 1000)

    def _known(self, member: Member) -> RankFacts:
        return self.facts.setdefault(member, RankFacts())

    def _keep_device(self, member: Member) -> None:
        pid = self._known(member).pid
        if pid is not None:
            self._processes.keep_device(member, pid)
