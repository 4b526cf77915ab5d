"""The rank's side: whatever is lost, late, repeated or out of order, it ends up where the controller is."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_ep.machines.rank.member import (
    Adopt,
    AdoptPlacement,
    AskSnapshot,
    Connect,
    Effect,
    Expelled,
    MakePromise,
    Mask,
    MemberMachine,
    ReleaseHold,
)
from elastic_ep.placement import Change, launch_placement
from elastic_ep.wire.messages import (
    Abort,
    Beat,
    Commit,
    Member,
    Numbered,
    PlacementChanged,
    Prepare,
    Published,
    Seat,
    Snapshot,
    View,
)

A, B, C, C2 = Member(0, 1), Member(1, 1), Member(2, 1), Member(2, 2)


def view(epoch: int, *members: Member, first_step: int = 0, park_at: int | None = None) -> View:
    return View(epoch, tuple(Seat(*member, first_step) for member in members), park_at)


def run(machine: MemberMachine, *events: Numbered | Snapshot) -> list[Effect]:
    effects: list[Effect] = []
    for event in events:
        effects += machine.step(event)
        machine.check()
    return effects


def member_of(me: Member, *members: Member) -> MemberMachine:
    """`me`, having had everything up to number 10 and the view of epoch 1."""
    machine = MemberMachine(me)
    run(machine, Snapshot(10, view(1, *members), None))
    return machine


def test_placements_are_adopted_in_order_and_a_snapshot_brings_the_whole() -> None:
    launched = launch_placement(3, 1, 3, 3)
    machine = MemberMachine(A)
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
    machine = MemberMachine(C)
    assert run(machine, Snapshot(10, view(1, A), None)) == [Adopt(view(1, A))]
    assert run(machine, Numbered(11, Prepare(1, (B, C)))) == [Connect((A, B)), MakePromise(1, seated=False)]


def test_a_joiner_learns_of_the_attempt_from_the_snapshot() -> None:
    machine = MemberMachine(C)
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
    assert run(MemberMachine(A), Numbered(0, Beat())) == [AskSnapshot()], "it has nothing yet"


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
    """Messages come in any order, some never, some twice, snapshots late. One beat at the end repairs the rest."""
    machine = MemberMachine(A)
    numbers = st.integers(1, max(1, story.head))
    masked: set[Member] = set()
    adopted = [0]
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
    assert holding == (story.attempts[-1].attempt if story.attempts[-1] else None)
    assert hear(Numbered(story.head, Beat())) is False, "and then there is peace"
