"""The membership machine under hypothesis: any order of events, stale and repeated ones too; and single rules."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from elastic_ep.machines.contract import Tick, UnexpectedEvent
from elastic_ep.machines.membership import events as ev
from elastic_ep.machines.membership.machine import STEP_GAP_AFTER_TOTAL_LOSS, MembershipMachine
from elastic_ep.machines.membership.relaunch import HOST_LOST
from elastic_ep.machines.rank.lifecycle import RANK
from elastic_ep.placement import EMPTY, Change, launch_placement
from elastic_ep.timing import MembershipConfig
from elastic_ep.wire.messages import Abort, Commit, Member, Prepare, RankState, Seat, Shutdown, View

CONFIG = MembershipConfig(
    attempt_deadline_ms=100,
    park_after_ms=30,
    stable_after_ms=500,
    relaunch_limit=3,
    relaunch_backoff_ms=50,
    relaunch_backoff_max_ms=150,
    relaunch_long_backoff_ms=400,
    relaunch_long_backoff_max_ms=1_500,
    forming_grace_ms=200,
    init_deadline_ms=1_000,
)
STARTING_UP = (RankState.LAUNCHING, RankState.INIT_CUDA, RankState.INIT_DIST)


def machine_of(num_ranks: int, redundant: int | None = None, **config: int) -> MembershipMachine:
    """One expert per rank, by default each in two copies."""
    copies = num_ranks if redundant is None else redundant
    placement = launch_placement(num_ranks, 1, num_ranks, copies)
    return MembershipMachine(num_ranks, placement, replace(CONFIG, **config))


@dataclass
class Witness:
    """Looks at all that goes in and comes out, and knows only what was promised, published and launched."""

    epoch: int = 0
    incarnations: dict[int, int] = field(default_factory=dict)
    running: set[Member] = field(default_factory=set)
    unended: set[Member] = field(default_factory=set)
    """Their host is lost."""
    up: set[Member] = field(default_factory=set)
    fenced: set[Member] = field(default_factory=set)
    promises: dict[int, dict[Member, int]] = field(default_factory=dict)
    attempt: int | None = None
    attempts: int = 0
    stopping: bool = False
    all_stopped: int = 0
    verdict: ev.Verdict | None = None
    view: View = field(default_factory=lambda: View(0, ()))

    def before(self, event: ev.Event) -> None:
        match event:
            case ev.ProcessGone(member):
                self.running.discard(member)
                self.unended.discard(member)
            case ev.HostLost(members):
                self.unended |= self.running & set(members)
                self.running -= set(members)
            case ev.StopRequested():
                self.stopping = True
            case ev.Promised(member, attempt, step):
                self.promises.setdefault(attempt, {}).setdefault(member, step)

    def after(self, effects: list[ev.Effect]) -> None:
        for effect in effects:
            match effect:
                case ev.Launch(member):
                    self._launched(member)
                case ev.Fence(member):
                    self.fenced.add(member)
                case ev.Publish(Prepare(number, joiners)):
                    assert not self.fenced & set(joiners), "admits one that is about to die"
                    before = {member.rank for member in self.unended}
                    assert not before & {member.rank for member in joiners}, "one before it may be at work"
                    assert not self.stopping
                    assert self.attempt is None
                    assert number > self.attempts
                    self.attempt = self.attempts = number
                case ev.Publish(Abort(number)):
                    assert number == self.attempt, "aborts what does not run"
                    self.attempt = None
                case ev.Publish(Commit(number, view)):
                    assert number == self.attempt, "commits what does not run"
                    self.attempt = None
                    self._gained(number, view)
                    self._published(view)
                case ev.Publish(View() as view):
                    assert view.members <= self.view.members, "a view without an attempt admits somebody"
                    assert view.park_at in (None, self.view.park_at), "a view without an attempt parks"
                    self._published(view)
                case ev.MemberUp(member):
                    assert member not in self.up
                    self.up.add(member)
                case ev.MemberDown(member):
                    self.up.remove(member)
                case ev.NothingWillServe() | ev.StartFailed():
                    assert self.verdict is None, "said once"
                    assert not self.stopping
                    assert effect.reason
                    self.verdict = effect
                case ev.AllStopped():
                    self.all_stopped += 1
                    assert self.stopping
                    assert not self.running
                    assert self.all_stopped == 1

    def _launched(self, member: Member) -> None:
        assert not self.stopping, "launched while stopping"
        assert self.verdict is None, "launched though it is over"
        assert not [m for m in self.running if m.rank == member.rank], "two processes of one rank"
        assert member.incarnation == self.incarnations.get(member.rank, 0) + 1
        self.incarnations[member.rank] = member.incarnation
        self.running.add(member)

    def _gained(self, number: int, view: View) -> None:
        old = set(self.view.seats)
        assert old <= set(view.seats), "an attempt loses a member or moves its first step"
        promises = self.promises[number]
        assert promises.keys() >= view.members, "somebody was not asked"
        promised = max(promises[member] for member in view.members)
        for seat in set(view.seats) - old:
            assert not self.view.seats or seat.first_step >= promised, "somebody may have begun that step"
            assert all(seat.first_step >= other.first_step for other in old)
        if view.park_at is not None and self.view.park_at is None:
            assert view.park_at >= promised

    def _published(self, view: View) -> None:
        assert view.epoch == self.epoch + 1
        self.epoch, self.view = view.epoch, view


class AnyOrder(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.witness = Witness()
        self.begun = 0

    @initialize(num_ranks=st.integers(1, 4), spare=st.booleans(), limit=st.sampled_from([0, 1, 3]))
    def start(self, num_ranks: int, spare: bool, limit: int) -> None:
        self.machine = machine_of(num_ranks, num_ranks if spare else 0, relaunch_limit=limit)
        self.feed(ev.Start())

    def feed(self, event: ev.Event) -> list[ev.Effect]:
        """As the controller does: a rank that breaks the protocol is suspected."""
        self.witness.before(event)
        was_parked = self.machine.view.park_at is not None and self.machine.view.seats
        was = self.machine.group_state
        try:
            effects = self.machine.step(event)
        except UnexpectedEvent:
            assert isinstance(event, ev.Reported)
            return self.feed(ev.Suspected(event.member, "protocol error"))
        self.witness.after(effects)
        self.machine.check()
        assert self.witness.view == self.machine.view
        assert self.witness.up == self.machine.view.members
        if (
            was_parked
            and self.machine.view.park_at is None
            and self.machine.view.seats
            and not self.machine.stopping
        ):
            assert self.machine.has_work
            assert self.machine.covered
        self.the_next_deadline_is_ahead()
        self.the_name_of_the_state_fits()
        self.its_moves_are_told(was, effects)
        self.the_outlook_fits()
        if any(isinstance(effect, ev.NothingWillServe) for effect in effects):
            self.too_few_are_left()
        return effects

    def too_few_are_left(self) -> None:
        records = self.machine.records
        well = [
            m for m in self.witness.running - self.witness.fenced if records[m.rank].state not in RANK.final
        ]
        placement = self.machine.placement
        assert len(well) * placement.slots_per_rank < placement.num_experts
        assert self.machine.config.relaunch_limit == 0

    def member(self, rank: int) -> Member:
        return self.machine.records[rank % self.machine.num_ranks].member

    ranks = st.integers(0, 3)

    @rule(by_ms=st.sampled_from([1, 30, 60, 200, 1_000]))
    def time_passes(self, by_ms: int) -> None:
        self.feed(Tick(self.machine.now_ms + by_ms))

    @rule()
    def the_deadline_comes(self) -> None:
        deadline_ms = self.machine.next_deadline_ms()
        if deadline_ms is not None:
            self.feed(Tick(deadline_ms))

    @rule(back_ms=st.integers(0, 100))
    def a_tick_is_repeated(self, back_ms: int) -> None:
        before = self.machine.state()
        assert self.feed(Tick(self.machine.now_ms - back_ms)) == []
        assert self.machine.state() == before

    @rule(rank=ranks)
    def comes_up_by_one_state(self, rank: int) -> None:
        record = self.machine.records[rank % self.machine.num_ranks]
        if record.member in self.witness.running and record.state in STARTING_UP:
            self.advance(record.member, record.state)

    def advance(self, member: Member, state: RankState) -> None:
        following = {RankState.INIT_CUDA: RankState.INIT_DIST, RankState.INIT_DIST: RankState.JOINING}
        if state in following:
            self.feed(ev.Reported(member, following[state]))
        else:
            self.feed(ev.ProcessStarted(member))

    @rule(rank=ranks, state=st.sampled_from(list(RankState)))
    def reports_anything(self, rank: int, state: RankState) -> None:
        self.feed(ev.Reported(self.member(rank), state, "because"))

    @rule()
    def everybody_promises(self) -> None:
        attempt = self.machine.attempt
        for member in sorted(attempt.awaited if attempt else ()):
            self.promise(member)

    @rule(rank=ranks, late=st.integers(0, 2))
    def one_promises_perhaps_late(self, rank: int, late: int) -> None:
        self.promise(self.member(rank), late)

    def promise(self, member: Member, late: int = 0) -> None:
        self.begun += 1
        seated = member in self.machine.view.members
        self.feed(ev.Promised(member, self.machine.attempts - late, self.begun + 2 if seated else 0))

    @rule(rank=ranks, again=st.booleans())
    def dies(self, rank: int, again: bool) -> None:
        self.feed(ev.DeathNoticed(self.member(rank), "killed"))
        if again:
            before = self.machine.state()
            assert self.feed(ev.DeathNoticed(self.member(rank), "killed")) == []
            assert self.machine.state() == before

    @rule(chosen=st.sets(ranks), again=st.booleans())
    def their_host_is_lost(self, chosen: set[int], again: bool) -> None:
        lost = ev.HostLost(tuple(self.member(rank) for rank in sorted(chosen)), "a host is lost")
        seated = self.machine.view.members & set(lost.members)
        epoch = self.machine.view.epoch
        self.feed(lost)
        assert not self.machine.view.members & set(lost.members)
        if not self.machine.stopping:
            assert self.machine.view.epoch <= epoch + bool(seated) + 1, "one view for all of them"
        if again:
            before = self.machine.state()
            assert self.feed(lost) == []
            assert self.machine.state() == before

    @rule(
        rank=ranks,
        again=st.booleans(),
        status=st.sampled_from(["signal 9", "signal 11", "exit status 1", HOST_LOST]),
    )
    def is_gone(self, rank: int, again: bool, status: str) -> None:
        member = self.member(rank)
        if member not in self.witness.running:
            return
        self.feed(ev.ProcessGone(member, status))
        if again:
            before = self.machine.state()
            assert self.feed(ev.ProcessGone(member, status)) == []
            assert self.machine.state() == before

    @rule(rank=ranks)
    def is_gone_with_its_host(self, rank: int) -> None:
        for member in sorted(self.witness.unended):
            if member.rank <= rank:
                self.feed(ev.ProcessGone(member, HOST_LOST))

    @rule(chosen=st.sets(ranks))
    def an_operator_wants_ranks_back(self, chosen: set[int]) -> None:
        records = self.machine.records
        dead = [
            r
            for r in chosen & records.keys() - self.machine.retired
            if records[r].gone and records[r].state is RankState.FAILED
        ]
        launched = [
            e.member.rank
            for e in self.feed(ev.RelaunchRequested(tuple(sorted(chosen))))
            if isinstance(e, ev.Launch)
        ]
        assert set(launched) == (set(dead) if not (self.machine.stopping or self.machine.verdict) else set())
        before = self.machine.state()
        assert self.feed(ev.RelaunchRequested(tuple(sorted(chosen)))) == [], "idempotent"
        assert self.machine.state() == before

    @rule(chosen=st.sets(ranks), patience_ms=st.sampled_from([0, 100, 5_000]))
    def an_operator_wants_ranks_away(self, chosen: set[int], patience_ms: int) -> None:
        asked = ev.RetireRequested(tuple(sorted(chosen)), patience_ms)
        self.feed(asked)
        assert self.machine.wanted >= self.machine.least
        before = self.machine.state()
        assert self.feed(asked) == [], "idempotent"
        assert self.machine.state() == before

    @rule(chosen=st.sets(ranks))
    def an_operator_asks_them_back(self, chosen: set[int]) -> None:
        asked = ev.ReturnRequested(tuple(sorted(chosen)))
        self.feed(asked)
        if not (self.machine.stopping or self.machine.verdict):
            assert not self.machine.retired & chosen
        assert self.feed(asked) == [], "idempotent"

    @rule(rank=ranks)
    def the_router_says_that_it_is_empty(self, rank: int) -> None:
        member = self.member(rank)
        self.feed(ev.RankDrained(member))
        if member not in self.machine.view.members and self.machine.view.members:
            assert self.machine.covered or ev.GroupState.HOLDING is self.machine.group_state

    @rule(rank=ranks)
    def is_suspected(self, rank: int) -> None:
        record = self.machine.records[rank % self.machine.num_ranks]
        fenced = ev.Fence(record.member, "hang") in self.feed(ev.Suspected(record.member, "hang"))
        assert fenced == (record.state not in RANK.final)

    @precondition(lambda self: any(record.member.incarnation > 1 for record in self.machine.records.values()))
    @rule(rank=ranks, kind=st.integers(0, 5))
    def news_of_an_old_incarnation(self, rank: int, kind: int) -> None:
        member = self.member(rank)
        if member.incarnation == 1:
            return
        old = Member(member.rank, member.incarnation - 1)
        if old in self.witness.unended:
            kind %= 4
        news: tuple[ev.Event, ...] = (
            ev.ProcessStarted(old),
            ev.Reported(old, RankState.JOINING),
            ev.Promised(old, self.machine.attempts, 0),
            ev.DeathNoticed(old, "killed"),
            ev.ProcessGone(old, "SIGKILL"),
            ev.Suspected(old, "hang"),
        )
        before = self.machine.state()
        assert self.machine.step(news[kind]) == []
        assert self.machine.state() == before

    @rule(began=st.booleans())
    def work_changes(self, began: bool) -> None:
        self.feed(ev.WorkBegan() if began else ev.WorkEnded())

    @rule(step=st.integers(0, 1_000))
    def a_step_is_seen(self, step: int) -> None:
        self.feed(ev.StepSeen(step))

    @rule(kind=st.sampled_from([ev.StopRequested, ev.StopRanks, ev.StopForced]), chance=st.integers(0, 5))
    def stops(self, kind: type, chance: int) -> None:
        if self.machine.stopping or (kind is ev.StopRequested and chance == 0):
            self.feed(kind())

    def the_next_deadline_is_ahead(self) -> None:
        deadline_ms = self.machine.next_deadline_ms()
        assert deadline_ms is None or deadline_ms > self.machine.now_ms

    def the_name_of_the_state_fits(self) -> None:
        machine, seated = self.machine, len(self.machine.view.seats)
        match machine.group_state:
            case ev.GroupState.SERVING:
                assert seated - len(machine.leaving) == machine.wanted
                assert machine.covered
                assert machine.view.park_at is None
            case ev.GroupState.DEGRADED:
                assert 0 < seated < len(machine.records) + len(machine.leaving)
                assert machine.covered
            case ev.GroupState.HOLDING:
                assert seated
                assert not machine.covered
            case ev.GroupState.PAUSED:
                assert machine.view.park_at is not None
            case ev.GroupState.STOPPING:
                assert machine.stopping
                assert machine.view.park_at is None

    def its_moves_are_told(self, was: ev.GroupState, effects: list[ev.Effect]) -> None:
        now = self.machine.group_state
        assert [e.state for e in effects if isinstance(e, ev.GroupMoved)] == ([now] if now is not was else [])
        if was is ev.GroupState.FORMING:  # nobody is seated but by an attempt
            assert now in (was, ev.GroupState.ADMITTING, ev.GroupState.STOPPING)
        assert was is not ev.GroupState.STOPPING or now is was

    def the_outlook_fits(self) -> None:
        machine = self.machine
        seen = machine.outlook(machine.now_ms)
        assert (seen.reason == "") == machine.can_serve
        assert seen.hopeless == (machine.stopping or machine.verdict is not None)
        if machine.can_serve and not seen.hopeless:
            assert seen.well
        if seen.hopeless or not machine.view.epoch:
            assert not seen.well
        if not machine.can_serve:
            assert not machine.outlook(machine.now_ms + machine.config.unwell_after_ms).well

    def teardown(self) -> None:
        """From wherever it got to, when nothing more goes wrong, the group becomes whole, parks, and stops.

        It serves then, unless it has said that it never will: and if so, it does not.
        """
        if not self.machine.stopping:
            self.settle()
            assert not self.machine.scaling or self.witness.verdict
            left = [record for record in self.machine.records.values() if not record.away]
            verdict = self.witness.verdict
            assert (verdict is None) == self.machine.can_serve
            if isinstance(verdict, ev.StartFailed):
                assert not self.machine.view.epoch
            elif verdict:
                assert self.machine.config.relaunch_limit == 0
            else:
                assert {record.member for record in left} == self.machine.view.members
                assert self.machine.config.relaunch_limit == 0 or len(left) == self.machine.wanted
                parked = self.machine.view.park_at is not None
                assert parked == (not self.machine.has_work)
            self.feed(ev.StopRequested())
        self.feed(ev.StopRanks())
        self.settle()
        self.feed(ev.StopForced())
        for member in sorted(self.witness.running):
            self.feed(ev.ProcessGone(member, "exit 0"))
        assert self.witness.all_stopped == 1
        assert self.machine.next_deadline_ms() is None

    def settle(self) -> None:
        """Everybody does its part; time passes only when nobody has anything left to do."""
        for _ in range(1_000):
            if not (self.everybody_does_its_part() or self.repairs() or self.waits_for_the_deadline()):
                return
        raise AssertionError("it never settles")

    def everybody_does_its_part(self) -> bool:
        before = self.machine.state()
        for member in sorted(self.witness.unended):
            self.feed(ev.ProcessGone(member, HOST_LOST))
        for record in list(self.machine.records.values()):
            member = record.member
            if member not in self.witness.running:
                continue
            if member in self.witness.fenced or record.state in RANK.final:
                self.feed(ev.ProcessGone(member, "SIGKILL"))
            elif member in self.machine.left:
                self.feed(ev.ProcessGone(member, "exit status 0"))
            elif record.state in STARTING_UP:
                self.advance(member, record.state)
        self.everybody_promises()
        return bool(self.machine.state() != before)

    def repairs(self) -> bool:
        """Experts without a copy are reloaded where a living rank has an empty slot or a second copy of another one."""
        machine, placement = self.machine, self.machine.placement
        if not machine.view.seats or machine.covered or machine.stopping:
            return False
        living = [seat.rank for seat in machine.view.seats]
        (row,) = placement.slots
        held: set[int] = set()
        free = []
        for slot, expert in enumerate(row):
            if placement.rank_of(slot) in living:
                if expert == EMPTY or expert in held:
                    free.append(slot)
                held.add(expert)
        lost = sorted(set(range(placement.num_experts)) - held)
        changes = tuple(Change(0, slot, expert) for slot, expert in zip(free, lost, strict=False))
        if not changes:
            return False
        self.feed(ev.Placed(placement.version + 1, changes))
        return True

    def waits_for_the_deadline(self) -> bool:
        deadline_ms = self.machine.next_deadline_ms()
        if deadline_ms is None:
            return False
        self.feed(Tick(deadline_ms))
        return True


AnyOrder.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestAnyOrder = pytest.mark.timeout(120)(AnyOrder.TestCase)


# Single rules


def feed(machine: MembershipMachine, *events: ev.Event) -> list[ev.Effect]:
    """The effects of all `events`."""
    effects: list[ev.Effect] = []
    for event in events:
        effects += machine.step(event)
        machine.check()
    return effects


def come_up(machine: MembershipMachine, *ranks: int) -> list[ev.Effect]:
    effects = []
    for rank in ranks:
        member = machine.records[rank].member
        states = (RankState.INIT_CUDA, RankState.INIT_DIST, RankState.JOINING)
        effects += feed(machine, *(ev.Reported(member, state) for state in states))
    return effects


def promise(machine: MembershipMachine, step: int = 0) -> list[ev.Effect]:
    attempt = machine.attempt
    assert attempt
    return feed(machine, *(ev.Promised(m, attempt.number, step) for m in sorted(attempt.awaited)))


def serving(num_ranks: int, redundant: int | None = None) -> MembershipMachine:
    return serving_with(num_ranks, redundant)


def serving_with(num_ranks: int, redundant: int | None = None, **config: int) -> MembershipMachine:
    machine = machine_of(num_ranks, redundant, **config)
    feed(machine, ev.Start(), ev.WorkBegan())
    come_up(machine, *range(num_ranks))
    promise(machine)
    assert machine.view.members == {Member(rank, 1) for rank in range(num_ranks)}
    return machine


def kill(machine: MembershipMachine, rank: int) -> list[ev.Effect]:
    member = machine.records[rank].member
    return feed(machine, ev.DeathNoticed(member, "killed"), ev.ProcessGone(member, "SIGKILL"))


def test_a_lost_host_is_one_view_and_counts_against_none_of_its_ranks() -> None:
    machine = serving(4)
    gone = (Member(2, 1), Member(3, 1))
    effects = feed(machine, ev.HostLost(gone, "host 1 is lost"))
    views = [e.body for e in effects if isinstance(e, ev.Publish) and isinstance(e.body, View)]
    assert [view.members for view in views] == [{Member(0, 1), Member(1, 1)}]
    assert [e.member for e in effects if isinstance(e, ev.MemberDown)] == list(gone)
    for _ in range(20):
        now = tuple(machine.records[rank].member for rank in (2, 3))
        assert [e.member for e in effects if isinstance(e, ev.Launch)] == list(now)
        effects = feed(machine, ev.HostLost(now, "again"))
    assert machine.records[2].early_deaths == 0


def test_who_is_launched_for_one_on_a_lost_host_is_admitted_when_all_before_it_are_gone() -> None:
    machine = serving(4, redundant=12)
    feed(machine, ev.HostLost((Member(2, 1), Member(3, 1)), "host 1 is lost"))
    feed(machine, ev.HostLost((Member(2, 2), Member(3, 2)), "the next one, too"))
    asked = come_up(machine, 2, 3)
    asked += feed(machine, ev.ProcessGone(Member(3, 1), HOST_LOST))
    assert not [e for e in asked if isinstance(e, ev.Publish)]
    asked = feed(machine, ev.ProcessGone(Member(3, 2), HOST_LOST))
    assert asked == [ev.Publish(Prepare(2, (Member(3, 3),))), ev.GroupMoved(ev.GroupState.ADMITTING)]
    promise(machine)
    asked = feed(machine, ev.ProcessGone(Member(2, 2), HOST_LOST), ev.ProcessGone(Member(2, 1), HOST_LOST))
    assert asked[0] == ev.Publish(Prepare(3, (Member(2, 3),)))


def test_a_group_grows_by_ranks_and_misses_them_from_then_on() -> None:
    machine = MembershipMachine(2, launch_placement(4, 1, 4, 8), CONFIG)
    feed(machine, ev.Start(), ev.WorkBegan())
    come_up(machine, 0, 1)
    promise(machine)
    assert machine.public_state == "Serving"
    launched = [e.member for e in feed(machine, ev.Grown((1, 2, 3))) if isinstance(e, ev.Launch)]
    assert launched == [Member(2, 1), Member(3, 1)]
    assert machine.public_state == "Degraded"
    assert machine.next_deadline_ms() == machine.now_ms + CONFIG.init_deadline_ms, "they must start in time"
    for rank in (2, 3):
        come_up(machine, rank)
        promise(machine)
    assert machine.public_state == "Serving"
    assert not feed(machine, ev.Grown((2, 3)))
    feed(machine, ev.HostLost((Member(2, 1), Member(3, 1)), "host 1 is lost"))
    assert machine.public_state == "Degraded"
    feed(machine, ev.StopRequested())
    assert not feed(machine, ev.Grown((4,))), "nothing new is started"


@pytest.mark.parametrize("stopping", [False, True])
def test_a_rank_that_is_named_twice_is_lost_once(stopping: bool) -> None:
    machine = serving(3)
    if stopping:
        feed(machine, ev.StopRequested())
    effects = feed(machine, ev.HostLost((Member(2, 1), Member(2, 1)), "a host is lost"))
    assert [e.member for e in effects if isinstance(e, ev.MemberDown)] == [Member(2, 1)]


def test_the_first_step_is_the_largest_promise() -> None:
    machine = serving(3)
    kill(machine, 2)
    come_up(machine, 2)
    assert machine.attempt
    number = machine.attempt.number
    for rank, step in ((0, 7), (1, 9)):
        feed(machine, ev.Promised(Member(rank, 1), number, step))
    feed(machine, ev.Promised(Member(2, 2), number, 0))
    assert machine.view.seat(2) == Seat(2, 2, 9)


def test_a_newcomer_does_not_begin_before_one_that_has_not_begun_yet() -> None:
    """Else it would run thousands of steps alone, while the other waits for it at its own first step."""
    machine = serving(3, redundant=6)
    for rank in (1, 2):
        kill(machine, rank)
    come_up(machine, 1)
    promise(machine, 5_000)
    kill(machine, 0)
    come_up(machine, 2)
    promise(machine, 1)  # rank 1 has not begun a step
    assert machine.view.seats == (Seat(1, 2, 5_000), Seat(2, 2, 5_000))


def test_after_a_total_loss_no_step_is_used_twice() -> None:
    machine = serving(2)
    feed(machine, ev.StepSeen(777))
    kill(machine, 0)
    kill(machine, 1)
    assert machine.group_state is ev.GroupState.FORMING
    assert machine.next_deadline_ms() == CONFIG.init_deadline_ms, "no deadline in the past: it would spin"
    come_up(machine, 0)
    promise(machine)
    assert machine.view.seats == (Seat(0, 2, 777 + STEP_GAP_AFTER_TOTAL_LOSS),)


def test_forming_waits_for_all_but_not_for_ever() -> None:
    machine = machine_of(3)
    feed(machine, ev.Start())
    assert come_up(machine, 0, 1)[-1] == ev.RankMoved(Member(1, 1), RankState.JOINING, "")
    effects = feed(machine, Tick(CONFIG.forming_grace_ms))
    assert effects[0] == ev.Publish(Prepare(1, (Member(0, 1), Member(1, 1))))


def test_relaunches_back_off_and_never_end() -> None:
    """The first is immediate; then the pause doubles up to its limit, and after some deaths up to another limit."""
    machine = serving(2)
    waits = []
    for _ in range(8):
        died_ms = machine.now_ms
        kill(machine, 1)
        if machine.records[1].relaunch_at_ms is not None:
            feed(machine, Tick(machine.records[1].relaunch_at_ms))
        waits.append(machine.now_ms - died_ms)
    assert waits == [0, 50, 100, 400, 800, 1_500, 1_500, 1_500]


def test_who_waits_long_says_how_long_and_what_to_do() -> None:
    machine = serving(2)
    for _ in range(4):
        kill(machine, 1)
        if machine.records[1].early_deaths < 4:
            feed(machine, Tick(machine.records[1].relaunch_at_ms or machine.now_ms))
    said = machine.reason(1, machine.now_ms)
    assert said == (
        "died: SIGKILL; next launch in 1 s (early deaths in a row: 4); "
        "POST /v1/fault_tolerance/relaunch to try now"
    )
    assert ev.Launch(Member(1, 5)) in feed(machine, ev.RelaunchRequested((1,)))
    assert machine.reason(1, machine.now_ms) == "died: SIGKILL"


def test_a_rank_that_served_and_was_killed_from_outside_is_back_at_once_however_often() -> None:
    machine = serving(2)
    for incarnation in range(1, 5 * CONFIG.relaunch_limit):
        member = Member(1, incarnation)
        effects = feed(machine, ev.DeathNoticed(member, "killed"), ev.ProcessGone(member, "signal 9"))
        assert ev.Launch(Member(1, incarnation + 1)) in effects
        come_up(machine, 1)
        promise(machine)


def test_a_rank_that_we_fence_again_and_again_is_a_crash_loop() -> None:
    machine = serving(2)
    for _ in range(3):
        member = machine.records[1].member
        feed(machine, ev.Suspected(member, "hang"), ev.ProcessGone(member, "signal 9"))
        if machine.records[1].relaunch_at_ms is not None:
            feed(machine, Tick(machine.records[1].relaunch_at_ms))
        come_up(machine, 1)
        promise(machine)
    assert machine.records[1].early_deaths == 3


def test_a_loss_that_is_laid_at_a_request_does_not_count() -> None:
    machine = serving(2)
    for _ in range(3 * CONFIG.relaunch_limit):
        member = machine.records[1].member
        effects = feed(
            machine,
            ev.Reported(member, RankState.FAILED, "IndexError", suspects=(17,)),
            ev.ProcessGone(member, "exit status 1"),
        )
        assert ev.Launch(Member(1, member.incarnation + 1)) in effects
        come_up(machine, 1)
        promise(machine)


@pytest.mark.parametrize("first", [ev.DeathNoticed(Member(1, 1), "died"), None])
def test_last_words_count_also_when_the_death_was_noticed_first(first: ev.Event | None) -> None:
    machine = serving(2)
    words = ev.Reported(Member(1, 1), RankState.FAILED, "IndexError", suspects=(17,))
    feed(
        machine, *(event for event in (first, words) if event), ev.ProcessGone(Member(1, 1), "exit status 1")
    )
    assert machine.records[1].early_deaths == 0
    assert machine.records[1].reason == "IndexError"


def fail_to_start(machine: MembershipMachine, rank: int, reason: str) -> list[ev.Effect]:
    member = machine.records[rank].member
    return feed(
        machine,
        ev.ProcessStarted(member),
        ev.Reported(member, RankState.FAILED, reason),
        ev.ProcessGone(member, "exit status 1"),
    )


def verdicts(effects: list[ev.Effect]) -> list[ev.Effect]:
    return [effect for effect in effects if isinstance(effect, (ev.NothingWillServe, ev.StartFailed))]


@pytest.mark.parametrize("limit", [0, 3])
@pytest.mark.parametrize("ranks", [1, 3])
def test_when_every_rank_fails_to_start_alike_that_is_all(ranks: int, limit: int) -> None:
    machine = machine_of(ranks, 2 * ranks, relaunch_limit=limit)
    effects = feed(machine, ev.Start())
    for rank in range(ranks):
        assert verdicts(effects) == []
        effects = fail_to_start(machine, rank, f"rank {rank}: cannot compile at 0x7f{rank}a, pid 4{rank}1")
    assert verdicts(effects) == [
        ev.StartFailed(f"rank {ranks - 1}: cannot compile at 0x7f{ranks - 1}a, pid 4{ranks - 1}1")
    ]
    launches = [e for e in feed(machine, Tick(10_000_000)) if isinstance(e, ev.Launch)]
    assert launches == [], "nothing is launched any more"


def test_ranks_that_fail_to_start_differently_or_are_killed_are_tried_again() -> None:
    machine = machine_of(2)
    feed(machine, ev.Start())
    for rank, reason in ((0, "no memory"), (1, "no device")):
        assert ev.Launch(Member(rank, 2)) in fail_to_start(machine, rank, reason)
    for rank in (0, 1):
        effects = feed(machine, ev.ProcessGone(Member(rank, 2), "signal 9"))
        assert verdicts(effects) == []
    assert machine.next_deadline_ms() is not None


def test_one_rank_that_cannot_start_does_not_keep_the_others_from_serving() -> None:
    machine = machine_of(3)
    feed(machine, ev.Start())
    come_up(machine, 0, 1)
    assert verdicts(fail_to_start(machine, 2, "no memory")) == []
    feed(machine, Tick(CONFIG.forming_grace_ms))
    promise(machine)
    assert machine.view.members == {Member(0, 1), Member(1, 1)}
    for rank in (0, 1):
        kill(machine, rank)
        assert verdicts(fail_to_start(machine, rank, "no memory")) == [], "somebody has served"


def test_a_rank_that_is_kept_away_comes_back_when_an_operator_says_so() -> None:
    machine = serving_with(3, relaunch_limit=0)
    kill(machine, 2)
    assert machine.reason(2, 0) == (
        "died: SIGKILL; stays away (--relaunch-limit 0); POST /v1/fault_tolerance/relaunch to try now"
    )
    assert ev.Launch(Member(2, 2)) in feed(machine, ev.RelaunchRequested((0, 1, 2)))
    come_up(machine, 2)
    promise(machine)
    assert machine.group_state is ev.GroupState.SERVING


def test_a_rank_that_is_wanted_back_while_it_dies_is_launched_when_it_is_gone() -> None:
    machine = serving_with(3, relaunch_limit=0)
    member = Member(2, 1)
    assert feed(machine, ev.Suspected(member, "hang"), ev.RelaunchRequested((2,)))[1:] == []
    assert ev.Launch(Member(2, 2)) in feed(machine, ev.ProcessGone(member, "signal 9"))


def test_nothing_will_serve_when_the_ranks_left_have_no_slots_for_all_experts() -> None:
    machine = serving_with(3, redundant=0, relaunch_limit=0)
    (verdict,) = verdicts(kill(machine, 1))
    assert isinstance(verdict, ev.NothingWillServe)
    assert "2 of 3 ranks are left, with slots for 2 of 3 experts" in verdict.reason
    assert not machine.outlook(machine.now_ms).well


def test_slots_for_all_experts_are_enough_to_wait_for_repair() -> None:
    machine = serving_with(4, relaunch_limit=0)
    assert verdicts([*kill(machine, 0), *kill(machine, 1)]) == [], "two ranks have slots for all four experts"
    (verdict,) = verdicts(kill(machine, 2))
    assert isinstance(verdict, ev.NothingWillServe)


def test_when_all_come_back_by_themselves_the_group_is_well_for_a_while() -> None:
    machine = serving(2)
    for rank in (0, 1):
        kill(machine, rank)
    assert machine.outlook(CONFIG.unwell_after_ms - 1).well
    seen = machine.outlook(CONFIG.unwell_after_ms)
    assert not seen.well
    assert not seen.hopeless
    assert "no rank serves" in seen.reason
    come_up(machine, 0, 1)
    promise(machine)
    assert machine.outlook(CONFIG.unwell_after_ms).well


def test_a_rank_that_was_stable_is_forgiven() -> None:
    machine = serving(2)
    for _ in range(2 * CONFIG.relaunch_limit):
        feed(machine, Tick(machine.now_ms + CONFIG.stable_after_ms))
        kill(machine, 1)
        assert machine.records[1].early_deaths == 0
        come_up(machine, 1)
        promise(machine)
    assert machine.group_state is ev.GroupState.SERVING


def test_a_joiner_that_does_not_connect_is_fenced_a_member_is_not() -> None:
    machine = serving(3)
    kill(machine, 2)
    come_up(machine, 2)
    assert machine.attempt
    feed(machine, ev.Promised(Member(0, 1), machine.attempt.number, 3))
    effects = feed(machine, Tick(CONFIG.attempt_deadline_ms))
    assert [e.member for e in effects if isinstance(e, ev.Fence)] == [Member(2, 2)]
    assert ev.Publish(Abort(2)) in effects
    assert machine.view.members == {Member(0, 1), Member(1, 1)}


def time_out(machine: MembershipMachine, *promising: int) -> list[Member]:
    """Whom an attempt has fenced in which only these ranks promise."""
    attempt = machine.attempt
    assert attempt
    for rank in promising:
        feed(machine, ev.Promised(machine.records[rank].member, attempt.number, 5))
    effects = feed(machine, Tick(attempt.deadline_ms))
    assert effects[0] == ev.Publish(Abort(attempt.number))
    return [effect.member for effect in effects if isinstance(effect, ev.Fence)]


def test_a_member_that_lets_attempts_in_a_row_time_out_is_fenced() -> None:
    machine = serving(3)
    kill(machine, 2)
    come_up(machine, 2)
    fenced = [time_out(machine, 1, 2) for _ in range(CONFIG.missed_attempts_limit)]
    assert fenced == [[], [], [Member(0, 1)]]
    assert machine.records[0].fenced == "did not promise in time, 3 attempts in a row"
    kill(machine, 0)
    promise(machine)
    come_up(machine, 0)
    promise(machine)
    assert machine.view.members == {Member(0, 2), Member(1, 1), Member(2, 2)}
    assert time_out_to_park(machine, 1, 2) == [], "the next incarnation starts afresh"


def time_out_to_park(machine: MembershipMachine, *promising: int) -> list[Member]:
    feed(machine, ev.WorkEnded(), Tick(machine.now_ms + CONFIG.park_after_ms))
    return time_out(machine, *promising)


def test_a_promise_makes_up_for_the_attempts_before() -> None:
    machine = serving(3)
    fenced = [time_out_to_park(machine, *promising) for promising in ((1, 2), (1, 2), (0, 2), (1, 2), (1, 2))]
    assert fenced == [[]] * 5
    assert time_out_to_park(machine, 1, 2) == [Member(0, 1)]


def test_a_joiner_that_nobody_can_connect_to_does_not_have_the_members_fenced() -> None:
    machine = serving(3)
    for incarnation in range(2, 2 + CONFIG.missed_attempts_limit):
        kill(machine, 2)
        if machine.records[2].relaunch_at_ms is not None:
            feed(machine, Tick(machine.records[2].relaunch_at_ms))
        come_up(machine, 2)
        assert time_out(machine) == [Member(2, incarnation)]


def test_a_promise_of_another_attempt_does_not_count() -> None:
    machine = serving(2)
    kill(machine, 1)
    come_up(machine, 1)
    feed(machine, ev.Promised(Member(1, 2), 2, 0), Tick(CONFIG.attempt_deadline_ms))  # rank 0 is late
    assert feed(machine, ev.Promised(Member(0, 1), 2, 4), ev.Promised(Member(1, 2), 3, 0)) == []
    feed(machine, ev.Promised(Member(0, 1), 3, 6))
    assert machine.view.seat(1) == Seat(1, 2, 6)


def test_an_expert_without_a_copy_parks_the_group_until_it_is_back() -> None:
    machine = serving(2, redundant=0)
    kill(machine, 1)
    promise(machine, 8)
    assert (machine.group_state, machine.view.park_at) == (ev.GroupState.HOLDING, 8)
    assert feed(machine, ev.WorkEnded(), ev.WorkBegan()) == [], "work alone does not help"
    come_up(machine, 1)
    promise(machine, 8)
    assert machine.view == View(4, (Seat(0, 1, 0), Seat(1, 2, 8)), None)


def test_a_loss_does_not_have_all_layers_looked_through() -> None:
    """Survivors wait for the view: with many layers and experts that took milliseconds."""
    machine = serving(3)
    machine.placement = None  # type: ignore[assignment]  # whoever looks at it fails
    kill(machine, 1)
    assert machine.group_state is ev.GroupState.DEGRADED


def test_stopping_begins_with_draining_and_starts_nothing_new() -> None:
    machine = serving(3)
    for _ in range(2):
        kill(machine, 2)
    assert machine.records[2].relaunch_at_ms is not None
    kill(machine, 1)
    come_up(machine, 1)
    assert machine.attempt
    effects = feed(machine, ev.StopRequested())
    assert ev.Publish(Abort(machine.attempts)) in effects
    assert ev.RankMoved(Member(0, 1), RankState.DRAINING, "") in effects
    assert feed(machine, Tick(10_000)) == []


def test_stopping_asks_those_that_can_hear_and_fences_the_others() -> None:
    machine = serving(3)
    kill(machine, 2)
    feed(machine, ev.StopRequested())
    effects = feed(machine, ev.StopRanks())
    assert [e.member for e in effects if isinstance(e, ev.SendTo)] == [Member(0, 1), Member(1, 1)]
    assert all(isinstance(e.message, Shutdown) for e in effects if isinstance(e, ev.SendTo))
    assert [e.member for e in effects if isinstance(e, ev.Fence)] == [Member(2, 2)]
