"""The membership machine: who takes part, from which step on.

Loss needs no agreement: the newest view simply lacks the member. Gain takes two phases: every member promises
not to begin some step before it hears the outcome, and the joiner's first step is the largest promise, which
therefore nobody has begun. Parking is the same protocol without a joiner.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any

from elastic_ep.machines.contract import Tick
from elastic_ep.machines.machine import Machine
from elastic_ep.machines.membership import events as ev
from elastic_ep.machines.membership.events import Effect, Event, GroupState
from elastic_ep.machines.membership.group import GROUP
from elastic_ep.machines.membership.leaving import Leaving, judge
from elastic_ep.machines.membership.outlook import Outlook, enough_slots, outlook, why_never
from elastic_ep.machines.membership.records import STARTING, Attempt, RankRecord
from elastic_ep.machines.membership.relaunch import HOST_LOST
from elastic_ep.machines.membership.start_failure import alike
from elastic_ep.machines.rank.lifecycle import RANK, REPORTED_TRIGGERS, SEATED
from elastic_ep.machines.tables import TableMachine
from elastic_ep.placement import Coverage, Placement
from elastic_ep.timing import MembershipConfig
from elastic_ep.wire.messages import Abort, Commit, Member, Prepare, RankState, Resume, Seat, Shutdown, View

STEP_GAP_AFTER_TOTAL_LOSS = 100_000
"""Steps that a member may have begun unseen since the last `StepSeen`; far more than could have run."""


@dataclass(eq=False)
class MembershipMachine(Machine[Event, Effect]):
    """Feed it with `step`; `view` and `records` may be read."""

    transient = Machine.transient | {"_covered", "_unseated"}
    num_ranks: int
    """At the start. `placement` has rows for all that there may be."""
    placement: Placement
    config: MembershipConfig = field(default_factory=MembershipConfig)

    def __post_init__(self) -> None:
        self.view = View(epoch=0, seats=())
        self.records = {
            rank: RankRecord(Member(rank, 1), TableMachine(RANK)) for rank in range(self.num_ranks)
        }
        """Of the ranks that the group wants."""
        self.attempt: Attempt | None = None
        self.attempts = 0
        self.now_ms = 0
        self.has_work = False
        self.idle_since_ms = 0
        self.highest_step = 0
        self.first_joining_ms: int | None = None
        self.retired: frozenset[int] = frozenset()
        """Ranks that an operator wants away, until they are asked back."""
        self.leaving: dict[int, Leaving] = {}
        """Those of them that have a seat still."""
        self.left: dict[Member, int] = {}
        """Members that have left and may live still; when they are killed."""
        self.returning: frozenset[int] = frozenset()
        """Ranks that were asked back and have no seat yet."""
        self.stopping = False
        self.verdict: ev.Verdict | None = None
        """Why this run is over, if it is."""
        self.unwell_since_ms: int | None = 0
        """Since when nobody could serve a request; None: somebody can."""
        self._all_stopped_said = False
        self._coverage = Coverage.of(self.placement)
        self._covered = (self.view, self._coverage, False)
        self._unseated = (self.view, tuple(self.records))
        """Both asked at every event, and the same until the view, or the placement, is another."""
        self._effects: list[Effect] = []
        self._handlers: dict[type, Callable[[Any], None]] = {
            ev.Start: self._on_start,
            ev.Grown: self._on_grown,
            Tick: self._on_tick,
            ev.ProcessStarted: self._on_process_started,
            ev.Reported: self._on_reported,
            ev.Promised: self._on_promised,
            ev.DeathNoticed: self._on_death,
            ev.HostLost: self._on_host_lost,
            ev.ProcessGone: self._on_gone,
            ev.Suspected: self._on_suspected,
            ev.WorkBegan: self._on_work_began,
            ev.WorkEnded: self._on_work_ended,
            ev.StepSeen: self._on_step_seen,
            ev.Placed: self._on_placed,
            ev.RelaunchRequested: self._on_relaunch_requested,
            ev.RetireRequested: self._on_retire_requested,
            ev.ReturnRequested: self._on_return_requested,
            ev.RankDrained: self._on_drained,
            ev.StopRequested: self._on_stop,
            ev.StopRanks: self._on_stop_ranks,
            ev.StopForced: self._on_stop_forced,
        }

    # Reading

    @property
    def group_state(self) -> GroupState:
        return next(case.state for case in GROUP if case.holds(self))

    @property
    def idle(self) -> bool:
        """The members are parked because there is nothing to do. They serve the next request at once."""
        return self.group_state is GroupState.PAUSED

    @property
    def public_state(self) -> GroupState:
        """For operators, to whom an idle group is as healthy as a busy one."""
        return next(case.state for case in GROUP if case.state is not GroupState.PAUSED and case.holds(self))

    @property
    def covered(self) -> bool:
        view, coverage, covered = self._covered
        if view is not self.view or coverage is not self._coverage:
            covered = self._coverage.by(seat.rank for seat in self.view.seats)
            self._covered = (self.view, self._coverage, covered)
        return covered

    @property
    def tolerates(self) -> int:
        return max(0, self.placement.tolerates([seat.rank for seat in self.view.seats]))

    @property
    def tolerates_hosts(self) -> int:
        """0 with one host."""
        return max(0, self.placement.tolerates_hosts([seat.rank for seat in self.view.seats]))

    @property
    def wanted(self) -> int:
        """Ranks that are to take part."""
        return len(self.records) - len(self.retired)

    @property
    def staying(self) -> int:
        """Those that have a seat and keep it."""
        return len(self.view.seats) - len(self.leaving)

    @property
    def least(self) -> int:
        """With fewer ranks some expert would have no slot."""
        return -(-self.placement.num_experts // self.placement.slots_per_rank)

    @property
    def scaling(self) -> bool:
        """Ranks leave, or are on their way back."""
        return bool(self.leaving or self.left or self.returning)

    @property
    def can_serve(self) -> bool:
        """Whether a request could get a token now."""
        return bool(self.view.seats) and self.covered and not self.stopping and self.verdict is None

    def outlook(self, now_ms: int) -> Outlook:
        """Whether the group serves, and if not, whether it will by itself."""
        return outlook(self, now_ms)

    def reason(self, rank: int, now_ms: int) -> str:
        """Why a rank is not well, and if it waits for its next launch, how long it does."""
        record = self.records[rank]
        if rank in self.retired and record.over:
            return f"{record.reason}; stays away until it is asked back"
        return record.reason if self.verdict else record.explained(now_ms, self.config)

    def next_deadline_ms(self) -> int | None:
        """When a `Tick` may next have an effect."""
        unseated = self._without_seat()
        times = [record.relaunch_at_ms for record in unseated if record.relaunch_at_ms is not None]
        times += [due for record in unseated if (due := record.init_due_ms(self.config)) is not None]
        times += self.left.values()
        for each in self.leaving.values():
            due_ms = each.due_ms
            times.append(due_ms if due_ms > self.now_ms else due_ms + self.config.spare_copies_ms)
        if self.attempt:
            times.append(self.attempt.deadline_ms)
        elif self._would_park():
            times.append(self.idle_since_ms + self.config.park_after_ms)
        if self.first_joining_ms is not None and not self.view.epoch:
            grace_ends_ms = self.first_joining_ms + self.config.forming_grace_ms
            if grace_ends_ms > self.now_ms:
                times.append(grace_ends_ms)
        return min(times, default=None)

    # The machine

    def _step(self, event: Event) -> list[Effect]:
        self._effects = []
        before = self.group_state
        self._handlers[type(event)](event)
        self._advance()
        self._judge()
        if (now := self.group_state) is not before:
            self._effects.append(ev.GroupMoved(now))
        return self._effects

    def _check(self) -> None:
        for seat in self.view.seats:
            record = self.records[seat.rank]
            assert record.member == seat.member, f"rank {seat.rank} is seated under an old incarnation"
            assert record.state in SEATED, f"{record.member} seated in {record.state}"
            assert not record.unended, f"{record.member} seated beside {sorted(record.unended)}"
        seated = {seat.rank for seat in self.view.seats}
        assert self.leaving.keys() <= self.retired & seated, "a rank leaves that is wanted, or not there"
        assert not self.left.keys() & self.view.members, "who has left is seated"
        assert not self.returning & (self.retired | seated), "a rank returns that is away for good, or there"
        if self.attempt:
            assert not self.attempt.joiners & self.view.members, "a joiner is already seated"
            assert self.attempt.awaited <= self.attempt.joiners | self.view.members, "awaits a stranger"
            assert self.attempt.awaited, "an attempt that awaits nobody has not ended"

    def _on_start(self, _event: ev.Start) -> None:
        for record in self.records.values():
            self._launch_first(record)

    def _on_grown(self, event: ev.Grown) -> None:
        if self.stopping or self.verdict:
            return
        for rank in event.ranks:
            if rank not in self.records:
                self.records[rank] = RankRecord(Member(rank, 1), TableMachine(RANK))
                self._launch_first(self.records[rank])
        self.records = dict(sorted(self.records.items()))
        self._find_unseated()

    def _on_tick(self, event: Tick) -> None:
        self.now_ms = max(self.now_ms, event.now_ms)
        if self.attempt and self.now_ms >= self.attempt.deadline_ms:
            self._time_out(self.attempt)
        for record in self._without_seat():
            if record.relaunch_at_ms is not None and self.now_ms >= record.relaunch_at_ms:
                self._relaunch(record)
            if record.member in self.left and self.now_ms >= self.left[record.member]:
                self._forget_left(record.member)
                self._fence(record, f"{ev.AS_ASKED}, but did not end by itself")
            due_ms = record.init_due_ms(self.config)
            if due_ms is not None and self.now_ms >= due_ms:
                record.failed = f"stuck in {record.state} for {self.config.init_deadline_ms / 1000:g} s"
                self._fence(record, record.failed)

    def _on_process_started(self, event: ev.ProcessStarted) -> None:
        record = self._current(event.member)
        if record and record.state is RankState.LAUNCHING:
            self._move(record, "process_started")

    def _on_reported(self, event: ev.Reported) -> None:
        record = self._current(event.member)
        if record is None or record.gone:
            return
        if event.state is RankState.FAILED and not record.fenced:
            # Its death may have been noticed before its last words are read.
            record.reason = record.failed = event.reason
            record.suspects = event.suspects
        if record.over:
            return
        if event.state is RankState.FAILED:
            self._fence(record, event.reason)
        elif event.state in REPORTED_TRIGGERS and event.state is not record.state:
            self._move(record, REPORTED_TRIGGERS[event.state])
            if event.state is RankState.JOINING:
                record.start_failure = ""
            if event.state is RankState.JOINING and self.first_joining_ms is None:
                self.first_joining_ms = self.now_ms

    def _on_promised(self, event: ev.Promised) -> None:
        attempt = self.attempt
        # A promise of another attempt is stale: counting it would let two members run one step under two views.
        if attempt is None or event.attempt != attempt.number or event.member not in attempt.awaited:
            return
        self.records[event.member.rank].missed_attempts = 0
        self.attempt = replace(
            attempt,
            awaited=attempt.awaited - {event.member},
            first_step=max(attempt.first_step, event.step),
        )
        if not self.attempt.awaited:
            self._commit(self.attempt)

    def _on_death(self, event: ev.DeathNoticed) -> None:
        record = self._current(event.member)
        if record is None or record.over:
            return
        self._lose([(record, record.why_ended(event.cause))])

    def _on_host_lost(self, event: ev.HostLost) -> None:
        records = [record for member in dict.fromkeys(event.members) if (record := self._current(member))]
        self._lose([(record, record.why_ended(event.cause)) for record in records if not record.over])
        for record in records:
            if not record.gone:
                record.unended |= {record.member}
                self._over(record, HOST_LOST)

    def _on_gone(self, event: ev.ProcessGone) -> None:
        if known := self.records.get(event.member.rank):
            known.unended -= {event.member}
        record = self._current(event.member)
        if record is None or record.gone:
            return
        if not record.over:
            self._lose([(record, record.why_ended(f"died: {event.status}"))])
        if not record.fenced and not record.failed:
            record.reason = record.why_ended(f"died: {event.status}")
        self._over(record, event.status)

    def _over(self, record: RankRecord, status: str) -> None:
        """The next incarnation may be launched."""
        record.gone = True
        self._forget_left(record.member)
        if self.stopping:
            return
        if record.state is RankState.FAILED:
            record.count_death(status, self.config)
        if record.member.rank in self.retired:
            record.away = True
        else:
            self._plan_relaunch(record)

    def _on_suspected(self, event: ev.Suspected) -> None:
        record = self._current(event.member)
        if record and not record.over:
            self._fence(record, event.reason)

    def _on_work_began(self, _event: ev.WorkBegan) -> None:
        self.has_work = True

    def _on_work_ended(self, _event: ev.WorkEnded) -> None:
        self.has_work = False
        self.idle_since_ms = self.now_ms

    def _on_step_seen(self, event: ev.StepSeen) -> None:
        self.highest_step = max(self.highest_step, event.step)

    def _on_placed(self, event: ev.Placed) -> None:
        self.placement = self.placement.changed(event.version, event.changes)
        self._coverage = self._coverage.after(event.changes, self.placement)

    def _on_relaunch_requested(self, event: ev.RelaunchRequested) -> None:
        if self.stopping or self.verdict:
            return
        for record in (
            self.records[rank] for rank in event.ranks if rank in self.records.keys() - self.retired
        ):
            if record.away or record.relaunch_at_ms is not None:
                self._relaunch(record)
            elif not record.gone and (record.fenced or record.over):
                record.wanted_back = True

    def _on_retire_requested(self, event: ev.RetireRequested) -> None:
        if self.stopping or self.verdict:
            return
        due_ms = self.now_ms + event.patience_ms
        for rank in event.ranks:
            if rank in self.leaving:
                before = self.leaving[rank]
                self.leaving = {**self.leaving, rank: replace(before, due_ms=min(before.due_ms, due_ms))}
            elif rank in self.records and rank not in self.retired and self.wanted > self.least:
                self._retire(self.records[rank], due_ms)

    def _retire(self, record: RankRecord, due_ms: int) -> None:
        """One that serves drains; one that is dead stays so; one that is on its way has nothing to lose."""
        rank = record.member.rank
        self.retired |= {rank}
        self.returning -= {rank}
        record.wanted_back = False
        if record.state is RankState.SERVING:
            self.leaving = {**self.leaving, rank: Leaving(due_ms)}
            self._move(record, "drain")
        elif record.over:
            record.relaunch_at_ms, record.away = None, record.gone
        elif record.member not in self.left:
            if self.attempt and record.member in self.attempt.joiners:
                self._abort()
            record.told_to_stop = True
            self._fence(record, f"{ev.AS_ASKED}, before it served")

    def _on_return_requested(self, event: ev.ReturnRequested) -> None:
        if self.stopping or self.verdict:
            return
        for record in (self.records[rank] for rank in event.ranks if rank in self.retired):
            rank = record.member.rank
            if rank in self.leaving:
                self._resume(record)
                continue
            self.retired -= {rank}
            self.returning |= {rank}
            if record.gone:
                self._relaunch(record)
            else:
                record.wanted_back = True

    def _on_drained(self, event: ev.RankDrained) -> None:
        rank = event.member.rank
        if self._current(event.member) and rank in self.leaving:
            self.leaving = {**self.leaving, rank: replace(self.leaving[rank], emptied=True)}

    def _on_stop(self, _event: ev.StopRequested) -> None:
        self.stopping = True
        self.leaving, self.left, self.returning = {}, {}, frozenset()
        if self.attempt:
            self._abort()
        for record in self.records.values():
            record.relaunch_at_ms = None
            if record.state is RankState.SERVING:
                self._move(record, "drain")

    def _on_stop_ranks(self, _event: ev.StopRanks) -> None:
        for record in self.records.values():
            if not record.over:
                if record.state in (*SEATED, RankState.JOINING):
                    record.told_to_stop = True
                    self._effects.append(ev.SendTo(record.member, Shutdown()))
                else:
                    self._fence(record, ev.STOPPING)

    def _on_stop_forced(self, _event: ev.StopForced) -> None:
        for record in self.records.values():
            if not record.gone:
                self._fence(record, f"{ev.STOPPING}: deadline passed")

    # Moves

    def _without_seat(self) -> list[RankRecord]:
        """Who is seated waits for no launch, and starts no more."""
        view, ranks = self._unseated
        if view is not self.view:
            ranks = self._find_unseated()
        return [self.records[rank] for rank in ranks]

    def _find_unseated(self) -> tuple[int, ...]:
        seated = {seat.rank for seat in self.view.seats}
        ranks = tuple(rank for rank in self.records if rank not in seated)
        self._unseated = (self.view, ranks)
        return ranks

    def _current(self, member: Member) -> RankRecord | None:
        """The record, if this incarnation is its present one: news of an older one is dropped."""
        record = self.records.get(member.rank)
        return record if record and record.member == member else None

    def _move(self, record: RankRecord, trigger: str, reason: str = "") -> None:
        if record.lifecycle.fire(trigger):
            record.since_ms = self.now_ms
            self._effects.append(ev.RankMoved(record.member, record.state, reason))

    def _launch_first(self, record: RankRecord) -> None:
        record.since_ms = self.now_ms
        self._effects.append(ev.Launch(record.member))

    def _fence(self, record: RankRecord, reason: str) -> None:
        record.fenced = record.fenced or reason
        self._effects.append(ev.Fence(record.member, reason))

    def _lose(self, losses: Sequence[tuple[RankRecord, str]]) -> None:
        """Records and why: all in one view."""
        seated = self.view.members
        for record, reason in losses:
            record.lost(self.now_ms, reason)
            asked = self.stopping or record.told_to_stop
            self._move(record, "stopped" if asked else "lost", reason)
        lost = {record.member for record, _ in losses}
        if self.attempt and lost & (self.attempt.joiners | seated):
            self._abort()
        if lost & seated:
            self._unseat(lost)
            self._effects += [
                ev.MemberDown(record.member, reason) for record, reason in losses if record.member in seated
            ]

    def _unseat(self, members: Set[Member]) -> None:
        ranks = {member.rank for member in members}
        self.leaving = {rank: each for rank, each in self.leaving.items() if rank not in ranks}
        seats = tuple(seat for seat in self.view.seats if seat.member not in members)
        self._publish_view(seats, self.view.park_at)

    # Leaving

    def _see_leavers_off(self) -> None:
        """As a loss, but for what it is called: who is asked to go ends by itself, and what it computes is dropped.

        A step in progress is computed again, which takes the others no longer than to agree on a last one would.
        """
        if not self.leaving:
            return
        seated = [seat.rank for seat in self.view.seats]
        verdict = judge(self.leaving, seated, self._coverage, self.now_ms, self.config.spare_copies_ms)
        for rank, why in verdict.stay.items():
            self._resume(self.records[rank], why)
        going = [self.records[rank] for rank in verdict.go]
        if not going:
            return
        for record in going:
            record.told_to_stop = True
            self.left = {**self.left, record.member: self.now_ms + self.config.leave_ms}
        if self.attempt:
            self._abort()
        self._unseat({record.member for record in going})
        self._effects += [ev.MemberDown(record.member, ev.AS_ASKED, left=True) for record in going]

    def _forget_left(self, member: Member) -> None:
        self.left = {other: due_ms for other, due_ms in self.left.items() if other != member}

    def _resume(self, record: RankRecord, why: str = "") -> None:
        rank = record.member.rank
        self.retired -= {rank}
        self.leaving = {other: each for other, each in self.leaving.items() if other != rank}
        self._move(record, "resume", why)
        self._effects += [ev.SendTo(record.member, Resume()), ev.MemberResumed(record.member, why)]

    def _plan_relaunch(self, record: RankRecord) -> None:
        if self._all_failed_alike():
            self._conclude(ev.StartFailed(record.start_failure))
        if self.verdict is None:
            record.plan_relaunch(self.now_ms, self.config)
            if record.relaunch_at_ms == self.now_ms:
                self._relaunch(record)

    def _relaunch(self, record: RankRecord) -> None:
        record.begin_anew()
        self._move(record, "relaunch")
        self._effects.append(ev.Launch(record.member))

    def _all_failed_alike(self) -> bool:
        """Before anybody had a seat, the last launch of every rank failed for the same reason."""
        return not self.view.epoch and alike(record.start_failure for record in self.records.values())

    def _conclude(self, verdict: ev.Verdict) -> None:
        """This run is over: nothing is launched any more, and whoever runs it has to end it."""
        if self.verdict is None:
            self.verdict = verdict
            for record in self.records.values():
                record.relaunch_at_ms = None
            if self.attempt:
                self._abort()
            self._effects.append(verdict)

    def _abort(self) -> None:
        assert self.attempt is not None
        self._effects.append(ev.Publish(Abort(self.attempt.number)))
        self.attempt = None
        # Parking is a convenience: after an abort wait a while before asking again.
        self.idle_since_ms = self.now_ms

    def _time_out(self, attempt: Attempt) -> None:
        """A joiner that did not connect is fenced at once, a member that did not promise when it is too often.

        A member may be late, and whether it hangs is the progress watch's to judge. But one that cannot connect does
        not hang, and would keep the joiners out for ever.

        HAZARD: to connect takes both sides. While a joiner is awaited too, it may be what all the members wait for:
        counted against them, one bad joiner would have them all fenced.
        """
        self._abort()
        joiners = attempt.awaited & attempt.joiners
        for member in sorted(joiners):
            self._fence(self.records[member.rank], "did not connect in time")
        if not joiners:
            for member in sorted(attempt.awaited):
                self._miss(self.records[member.rank])

    def _miss(self, record: RankRecord) -> None:
        record.missed_attempts += 1
        if record.missed_attempts >= self.config.missed_attempts_limit:
            self._fence(record, f"did not promise in time, {record.missed_attempts} attempts in a row")

    def _commit(self, attempt: Attempt) -> None:
        self.attempt = None
        seats, park_at = self.view.seats, self.view.park_at
        # A member that has not begun yet promises little: the newcomer must not run up to it alone.
        first_step = max(attempt.first_step, *(seat.first_step for seat in seats), 0)
        if not attempt.joiners:
            park_at = first_step
        if not seats:
            park_at = None
            first_step = self.highest_step + STEP_GAP_AFTER_TOTAL_LOSS if self.view.epoch else 0
        joined = tuple(Seat(*member, first_step) for member in sorted(attempt.joiners))
        all_seats = tuple(sorted(seats + joined, key=lambda seat: seat.rank))
        if attempt.joiners and self.has_work and self._coverage.by(seat.rank for seat in all_seats):
            park_at = None
        self.highest_step = max(self.highest_step, first_step)
        self.returning -= {seat.rank for seat in joined}
        self.view = View(self.view.epoch + 1, all_seats, park_at, tuple(sorted(self.left)))
        self._effects.append(ev.Publish(Commit(attempt.number, self.view)))
        self.idle_since_ms = self.now_ms
        for seat in joined:
            self._move(self.records[seat.rank], "admitted")
            self._effects.append(ev.MemberUp(seat.member))

    def _publish_view(self, seats: tuple[Seat, ...], park_at: int | None) -> None:
        left = tuple(sorted(self.left))
        self.view = View(self.view.epoch + 1, seats, park_at if seats else None, left)
        self._effects.append(ev.Publish(self.view))

    # What follows from the state alone

    def _advance(self) -> None:
        """Begin or end what the state now calls for."""
        if self.stopping:
            self._say_all_stopped()
            if self.view.park_at is not None:
                self._publish_view(self.view.seats, None)
            return
        if self.verdict:
            return
        self._see_leavers_off()
        if self.attempt and not self.attempt.joiners and self.has_work and self.covered:
            self._abort()
        if self.attempt is None:
            joiners = self._ready_joiners()
            if joiners:
                self._begin(joiners)
            elif self._would_park() and (
                not self.covered or self.now_ms >= self.idle_since_ms + self.config.park_after_ms
            ):
                self._begin(frozenset())
        if self.view.park_at is not None and self.has_work and self.covered:
            self._publish_view(self.view.seats, None)

    def _would_park(self) -> bool:
        wanted = bool(self.view.seats) and (not self.has_work or not self.covered)
        return wanted and self.view.park_at is None and not self.stopping and self.verdict is None

    def _ready_joiners(self) -> frozenset[Member]:
        waiting = frozenset(
            record.member
            for record in self._without_seat()
            if record.state is RankState.JOINING and not record.fenced and not record.unended
        )
        if self.view.seats or not waiting:
            return waiting
        # Forming: all together, unless somebody is hopelessly late.
        missing = [r for r in self.records.values() if r.member not in waiting and not r.away]
        assert self.first_joining_ms is not None
        late = self.now_ms >= self.first_joining_ms + self.config.forming_grace_ms
        return waiting if not missing or late or self.view.epoch else frozenset()

    def _begin(self, joiners: frozenset[Member]) -> None:
        self.attempts += 1
        self.attempt = Attempt(
            number=self.attempts,
            joiners=joiners,
            awaited=joiners | self.view.members,
            first_step=0,
            deadline_ms=self.now_ms + self.config.attempt_deadline_ms,
        )
        self._effects.append(ev.Publish(Prepare(self.attempts, tuple(sorted(joiners)))))

    def _say_all_stopped(self) -> None:
        over = all(record.gone for record in self.records.values())
        if over and not self._all_stopped_said:
            self._all_stopped_said = True
            self._effects.append(ev.AllStopped())

    def _judge(self) -> None:
        """Whether somebody can serve, and whether anybody ever will."""
        if self.can_serve:
            self.unwell_since_ms = None
        elif self.unwell_since_ms is None:
            self.unwell_since_ms = self.now_ms
        if self.stopping or self.config.relaunch_limit or enough_slots(self):
            return
        # While the first launches are under way it may turn out that they all fail alike.
        if self.view.epoch or all(
            record.gone or record.state not in STARTING for record in self.records.values()
        ):
            self._conclude(ev.NothingWillServe(why_never(self)))
