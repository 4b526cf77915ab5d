"""The rank's side: whatever is lost, late, repeated or out of order, it ends up where the controller is."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_ep.machines.contract import UnexpectedEvent
from elastic_ep.machines.rank.events import (
    Adopt,
    AdoptPlacement,
    AskSnapshot,
    Connect,
    DeviceOpened,
    Effect,
    EngineReady,
    Event,
    Exit,
    Expelled,
    MakePromise,
    Mask,
    PeerDied,
    ReleaseHold,
    RouteAround,
    Started,
    StepsEnded,
    StepsFailed,
    StopSteps,
    WarmedUp,
)
from elastic_ep.machines.rank.machine import RankMachine
from elastic_ep.placement import Change, launch_placement
from elastic_ep.wire.messages import (
    Abort,
    Beat,
    Commit,
    Drain,
    Member,
    Numbered,
    PlacementChanged,
    Prepare,
    Published,
    RankReport,
    RankState,
    Seat,
    Shutdown,
    Snapshot,
    View,
)

A, B, C, C2 = Member(0, 1), Member(1, 1), Member(2, 1), Member(2, 2)


def view(epoch: int, *members: Member, first_step: int = 0, park_at: int | None = None) -> View:
    return View(epoch, tuple(Seat(*member, first_step) for member in members), park_at)


def run(machine: RankMachine, *events: Event) -> list[Effect]:
    effects: list[Effect] = []
    for event in events:
        effects += machine.step(event)
        machine.check()
    return effects


def joining(me: Member) -> RankMachine:
    """`me`, warm and subscribed, having had everything up to number 0, when there was no view."""
    machine = RankMachine(me)
    run(machine, Started(), EngineReady(), WarmedUp(), Numbered(0, Beat()), Snapshot(0, view(0), None))
    assert machine.stage is RankState.JOINING
    return machine


def member_of(me: Member, *members: Member) -> RankMachine:
    """`me`, having had everything up to number 10 and the view of epoch 1."""
    machine = joining(me)
    run(machine, Snapshot(10, view(1, *members), None))
    return machine


def test_placements_are_adopted_in_order_and_a_snapshot_brings_the_whole() -> None:
    launched = launch_placement(3, 1, 3, 3)
    machine = joining(A)
    run(machine, Snapshot(10, view(1, A, B), None, launched))
    first, second = PlacementChanged(1, (Change(0, 0, -1),)), PlacementChanged(2, (Change(0, 0, 2),))
    assert run(machine, Numbered(12, second)) == [AskSnapshot()]
    emptied = launched.changed(1, first.changes)
    filled = emptied.changed(2, second.changes)
    assert run(machine, Numbered(11, first)) == [AdoptPlacement(emptied), AdoptPlacement(filled)]
    assert run(machine, Snapshot(12, view(1, A, B), None, filled)) == []
    assert filled.slots[0][0] == 2


def test_a_member_connects_promises_and_adopts() -> None:
    machine = member_of(A, A, B)
    assert run(machine, Numbered(11, Prepare(1, (C,)))) == [Connect((C,)), MakePromise(1, seated=True)]
    after = view(2, A, B, C)
    assert run(machine, Numbered(12, Commit(1, after))) == [Adopt(after), ReleaseHold()]


def test_a_joiner_connects_to_everybody_and_to_the_other_joiners() -> None:
    machine = joining(C)
    assert run(machine, Snapshot(10, view(1, A), None)) == [Adopt(view(1, A))]
    assert run(machine, Numbered(11, Prepare(1, (B, C)))) == [Connect((A, B)), MakePromise(1, seated=False)]


def test_a_joiner_learns_of_the_attempt_from_the_snapshot() -> None:
    machine = joining(C)
    effects = run(machine, Snapshot(10, view(1, A, B), Prepare(1, (C,))))
    assert effects == [Adopt(view(1, A, B)), Connect((A, B)), MakePromise(1, seated=False)]


def test_who_is_neither_member_nor_joiner_looks_on() -> None:
    machine = member_of(C, A, B)
    assert run(machine, Numbered(11, Prepare(1, (Member(3, 1),)))) == []


def test_parking_promises_without_connecting() -> None:
    machine = member_of(A, A, B)
    assert run(machine, Numbered(11, Prepare(1, ()))) == [MakePromise(1, seated=True)]


def test_an_abort_releases_the_hold_once() -> None:
    machine = member_of(A, A, B)
    assert run(machine, Numbered(11, Prepare(1, (C,))), Numbered(12, Abort(1)))[-1] == ReleaseHold()
    assert run(machine, Numbered(13, Abort(1))) == []


def test_a_loss_masks_at_once_and_before_the_new_view_is_adopted() -> None:
    machine = member_of(A, A, B, C)
    assert run(machine, Numbered(11, view(2, A))) == [Mask(B), Mask(C), Adopt(view(2, A))]


def test_a_rank_that_came_back_unseen_is_masked_under_its_old_incarnation() -> None:
    machine = member_of(A, A, C)
    assert run(machine, Snapshot(20, view(5, A, C2), None)) == [Mask(C), Adopt(view(5, A, C2))]


def test_who_is_no_longer_in_the_view_is_expelled() -> None:
    machine = member_of(B, A, B)
    assert run(machine, Numbered(11, view(2, A))) == [Expelled()]


def test_a_gap_asks_for_a_snapshot_and_keeps_what_comes_early() -> None:
    machine = member_of(A, A, B, C)
    assert run(machine, Numbered(12, Prepare(2, ()))) == [AskSnapshot()]
    effects = run(machine, Numbered(11, view(2, A, B)))
    assert effects == [Mask(C), Adopt(view(2, A, B)), MakePromise(2, seated=True)]


def test_a_snapshot_closes_the_gap_and_what_came_early_follows_it() -> None:
    machine = member_of(A, A, B, C)
    run(machine, Numbered(13, Abort(1)))
    effects = run(machine, Snapshot(12, view(2, A, B), Prepare(1, ())))
    assert effects == [Mask(C), Adopt(view(2, A, B)), MakePromise(1, seated=True), ReleaseHold()]
    assert machine.number == 13


def test_a_beat_shows_what_is_missing_and_nothing_else() -> None:
    machine = member_of(A, A, B)
    assert run(machine, Numbered(10, Beat()), Numbered(9, Beat())) == []
    assert run(machine, Numbered(11, Beat())) == [AskSnapshot()]
    assert machine.number == 10
    assert run(RankMachine(A), Numbered(0, Beat())) == [AskSnapshot()], "it has nothing yet"


def test_the_past_is_not_applied_again() -> None:
    machine = member_of(A, A, B)
    run(machine, Numbered(11, Prepare(1, (C,))), Numbered(12, Abort(1)), Numbered(13, Prepare(2, (C,))))
    assert run(machine, Numbered(12, Abort(1))) == [], "a stale abort must not release the hold of attempt 2"
    assert run(machine, Snapshot(12, view(1, A, B), None)) == []
    assert run(machine, Snapshot(13, view(1, A, B), Prepare(2, (C,)))) == [], "promises once"
    assert run(machine, Numbered(13, Prepare(2, (C,)))) == []


def test_the_end_of_an_attempt_is_seen_in_a_snapshot_too() -> None:
    machine = member_of(A, A, B)
    run(machine, Numbered(11, Prepare(1, (C,))))
    after = view(2, A, B, C)
    assert run(machine, Snapshot(12, after, None)) == [Adopt(after), ReleaseHold()]


def test_the_next_attempt_is_seen_in_a_snapshot_too() -> None:
    machine = member_of(A, A, B)
    run(machine, Numbered(11, Prepare(1, (C,))))
    assert run(machine, Snapshot(13, view(1, A, B), Prepare(2, (C,))))[-1] == MakePromise(2, seated=True)


# Any loss, any order


@dataclass
class Story:
    """What a controller published, and what a snapshot would have said at each number."""

    bodies: list[Published] = field(default_factory=list)
    views: list[View] = field(default_factory=lambda: [view(1, A, B)])
    attempts: list[Prepare | None] = field(default_factory=lambda: [None])

    def tell(self, body: Published, now: View, attempt: Prepare | None) -> None:
        self.bodies.append(body)
        self.views.append(now)
        self.attempts.append(attempt)

    def snapshot(self, number: int) -> Snapshot:
        return Snapshot(number, self.views[number], self.attempts[number])

    @property
    def head(self) -> int:
        return len(self.bodies)


@st.composite
def stories(draw: st.DrawFn) -> Story:
    """Rank 0 stays; others are lost and come back under new incarnations; attempts end either way."""
    story = Story()
    incarnations = [1, 1, 0, 0]
    for _ in range(draw(st.integers(1, 14))):
        now, attempt = story.views[-1], story.attempts[-1]
        others = [seat for seat in now.seats if seat.rank]
        what = draw(st.sampled_from(["loss", "attempt", "end"]))
        if what == "loss" and others:
            if attempt:
                story.tell(Abort(attempt.attempt), now, None)
            lost = draw(st.sampled_from(others))
            after = View(now.epoch + 1, tuple(seat for seat in now.seats if seat != lost), now.park_at)
            story.tell(after, after, None)
        elif what == "attempt" and attempt is None:
            absent = [rank for rank in range(4) if now.seat(rank) is None]
            joining = draw(st.sets(st.sampled_from(absent))) if absent else set()
            for rank in joining:
                incarnations[rank] += 1
            joiners = tuple(Member(rank, incarnations[rank]) for rank in sorted(joining))
            prepare = Prepare(story.head + 1, joiners)
            story.tell(prepare, now, prepare)
        elif what == "end" and attempt is not None and draw(st.booleans()):
            story.tell(Abort(attempt.attempt), now, None)
        elif what == "end" and attempt is not None:
            seats = now.seats + tuple(Seat(*joiner, story.head) for joiner in attempt.joiners)
            after = View(now.epoch + 1, seats, None if attempt.joiners else story.head)
            story.tell(Commit(attempt.attempt, after), after, None)
    return story


@settings(max_examples=200, deadline=None)
@given(stories(), st.data())
def test_any_loss_and_any_order_converges(story: Story, data: st.DataObject) -> None:
    """Messages come in any order, some never, some twice, snapshots late. One beat at the end repairs the rest.

    Of a member, and of a rank that has heard nothing at all yet and only looks on.
    """
    seated_here = data.draw(st.booleans())
    machine = joining(A) if seated_here else RankMachine(Member(9, 1))
    if seated_here:
        run(machine, story.snapshot(0))
    numbers = st.integers(1, max(1, story.head))
    masked: set[Member] = set()
    adopted = [machine.view.epoch]
    promised: list[int] = []
    holding: int | None = None

    def hear(event: Numbered | Snapshot) -> bool:
        """Whether it asks for a snapshot."""
        nonlocal holding
        asks = False
        for effect in run(machine, event):
            match effect:
                case AskSnapshot():
                    asks = True
                case Mask(member):
                    masked.add(member)
                case Adopt(now):
                    assert now.epoch > adopted[-1], "goes back to an older view"
                    assert not masked & now.members, "a member that was lost is back"
                    adopted.append(now.epoch)
                case MakePromise(attempt, seated):
                    assert seated
                    assert attempt not in promised, "promises twice"
                    promised.append(attempt)
                    holding = attempt
                case ReleaseHold():
                    holding = None
                case Expelled():
                    pytest.fail("rank 0 was never lost")
        assert machine.number is None or machine.view == story.views[machine.number]
        return asks

    arriving = data.draw(st.lists(st.tuples(numbers, st.integers(0, 3)), max_size=3 * story.head))
    asked = False
    for number, kind in arriving:
        if kind == 0 and asked:
            hear(story.snapshot(number))  # answered when the controller was there
        elif story.head:
            asked = hear(Numbered(number, story.bodies[number - 1])) or asked
    if hear(Numbered(story.head, Beat())):
        hear(story.snapshot(story.head))
    assert machine.number == story.head
    assert machine.view == story.views[-1]
    assert machine.attempt == story.attempts[-1]
    attempt = story.attempts[-1]
    assert holding == (attempt.attempt if attempt and seated_here else None)
    assert hear(Numbered(story.head, Beat())) is False, "and then there is peace"


# The life of a rank


def reports(effects: list[Effect]) -> list[RankState]:
    return [effect.state for effect in effects if isinstance(effect, RankReport)]


def test_a_rank_says_each_stage_of_its_start_and_the_opened_device_once_more() -> None:
    machine = RankMachine(A)
    effects = run(machine, Started(), DeviceOpened(), EngineReady(), WarmedUp())
    assert reports(effects) == [RankState.INIT_CUDA, RankState.INIT_CUDA, RankState.INIT_DIST]
    assert run(machine, Snapshot(0, view(0), None)) == [], (
        "what is published now may still be lost on the way"
    )
    assert reports(run(machine, Numbered(0, Beat()))) == [RankState.JOINING]
    assert reports(run(machine, Numbered(1, view(1, A)))) == [], "the controller knows whom it has admitted"
    assert machine.stage is RankState.SERVING


def test_whoever_knows_the_group_before_it_is_warm_says_that_it_is_ready_then() -> None:
    machine = RankMachine(A)
    run(machine, Started(), EngineReady(), Numbered(0, Beat()), Snapshot(0, view(0), None))
    assert run(machine, WarmedUp(77)) == [RankReport(RankState.JOINING, num_pages=77)]


def test_a_view_that_seats_a_rank_that_is_not_ready_is_refused() -> None:
    machine = RankMachine(A)
    run(machine, Started(), EngineReady())
    with pytest.raises(UnexpectedEvent, match="no admitted in InitDist"):
        machine.step(Snapshot(1, view(1, A), None))


def test_who_is_behind_asks_until_a_snapshot_has_come() -> None:
    machine = RankMachine(A)
    now: list[bool] = []
    beat, snapshot = Numbered(10, Beat()), Snapshot(10, view(1), None)
    for event in (snapshot, beat, Numbered(12, Abort(1)), beat, snapshot, Numbered(13, Beat()), snapshot):
        run(machine, event)
        now.append(machine.synchronised)
    assert now == [False, True, False, False, True, False, True]


def test_masks_wait_for_the_engine_and_each_comes_once() -> None:
    machine = RankMachine(A)
    assert run(machine, Started(), PeerDied(C), PeerDied(A))[1:] == [RouteAround(C)]
    assert run(machine, EngineReady()) == [Mask(C), RankReport(RankState.INIT_DIST)]
    assert run(machine, PeerDied(B), PeerDied(B)) == [Mask(B), RouteAround(B), RouteAround(B)]


def test_a_notice_masks_before_the_view_does() -> None:
    machine = member_of(A, A, B, C)
    assert run(machine, PeerDied(C)) == [Mask(C), RouteAround(C)]
    assert run(machine, Numbered(11, view(2, A, B))) == [Adopt(view(2, A, B))]


@pytest.mark.parametrize("drain_first", [True, False])
def test_a_drain_counts_whether_it_or_the_view_that_seats_the_rank_comes_first(drain_first: bool) -> None:
    machine = joining(A)
    events: list[Event] = [Drain(), Numbered(1, view(1, A))]
    assert run(machine, *(events if drain_first else reversed(events))) == [Adopt(view(1, A))]
    assert machine.stage is RankState.DRAINING


def test_a_rank_that_is_told_to_stop_masks_its_peers_and_ends_with_its_steps() -> None:
    machine = member_of(A, A, B, C)
    run(machine, PeerDied(C))
    assert run(machine, Shutdown()) == [StopSteps(), Mask(B)]
    assert run(machine, StepsEnded()) == [RankReport(RankState.STOPPED), Exit(0)]
    assert run(machine, Numbered(11, view(2, B))) == [], "nothing is expelled that has ended"


def test_a_rank_without_an_engine_stops_at_once() -> None:
    machine = RankMachine(A)
    assert run(machine, Started(), Shutdown())[1:] == [StopSteps(), Exit(0)]
    assert run(machine, StepsFailed("too late")) == []


def test_a_failure_is_reported_with_its_reason_and_its_suspects() -> None:
    machine = member_of(A, A, B)
    failure = run(machine, StepsFailed("the device is gone", (7,)))
    assert failure == [RankReport(RankState.FAILED, "the device is gone", (7,)), Exit(1)]


@settings(max_examples=200, deadline=None)
@given(stories(), st.data())
def test_whatever_comes_a_rank_lives_by_its_table(story: Story, data: st.DataObject) -> None:
    """News of the group, of the forward thread and of deaths, in any order in which each of them can come."""
    machine = joining(A) if data.draw(st.booleans()) else RankMachine(Member(9, 1))
    starts: list[Event] = [] if machine.me == A else [Started(), DeviceOpened(), EngineReady(), WarmedUp()]
    others = st.sampled_from([B, C, C2, A])
    numbers = st.integers(0, story.head)
    told = [machine.stage]
    masked: list[Member] = []
    ended = False
    for kind in data.draw(st.lists(st.integers(0, 9), max_size=40)):
        number = data.draw(numbers)
        event: Event
        if kind < 2 and starts:
            event = starts.pop(0)
        elif kind < 5 and number:
            event = Numbered(number, story.bodies[number - 1])
        elif kind < 7:
            event = story.snapshot(number)
        elif kind == 7:
            event = PeerDied(data.draw(others))
        elif kind == 8:
            event = Drain() if data.draw(st.booleans()) else Shutdown()
        elif machine.stage in (RankState.LAUNCHING, RankState.INIT_CUDA):
            continue
        else:
            event = StepsEnded() if data.draw(st.booleans()) else StepsFailed("broken")
        before = machine.stage
        for effect in run(machine, event):
            assert not ended, "something follows after the end"
            match effect:
                case Mask(member):
                    assert EngineReady() not in starts, "there is nothing to mask in"
                    masked.append(member)
                case RankReport(state):
                    assert state is told[-1] is RankState.INIT_CUDA or state is machine.stage is not before
                    told.append(state)
                case Exit(status):
                    assert machine.lifecycle.final
                    assert (status == 0) is (machine.stage is RankState.STOPPED)
                    ended = True
                case Expelled():
                    pytest.fail("it was never lost")
    assert len(masked) == len(set(masked)), "a member is masked twice"
    assert ended is machine.lifecycle.final
