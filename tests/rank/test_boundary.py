"""What the control loop leaves in the mailbox, the forward thread takes in at a boundary: however the two interleave."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from elastic_ep.placement import Placement
from elastic_ep.rank.forward import ForwardThread
from elastic_ep.rank.mailbox import Mailbox
from elastic_ep.rank.outbox import Posted
from elastic_ep.wire.messages import Assign, Cancel, Member, SamplingParams, Seat, View
from elastic_ep.wire.slot_messages import PlacementSeen
from tests.kit.lone_rank import CONFIG
from tests.rank import test_mailbox
from tests.rank.test_mailbox import SteppedMailbox, interleave, schedules

ME, PEER, JOINER = Member(0, 1), Member(1, 1), Member(1, 2)
ALL = View(1, (Seat(*ME, 0), Seat(*PEER, 0)))
WITHOUT = View(2, (Seat(*ME, 0),))
JOINED = View(3, (Seat(*ME, 0), Seat(*JOINER, 0)))
FIRST = CONFIG.placement.changed(1, ())
SECOND = CONFIG.placement.changed(2, ())


class Runner:
    """Keeps what it routes by and what it was given."""

    def __init__(self) -> None:
        self.routed: set[int] = set()
        self.placement: Placement | None = None
        self.heard: list[Any] = []

    def set_routing(self, ranks: set[int], placement: Placement | None = None) -> bool:
        self.routed = set(ranks)
        self.placement = placement or self.placement
        return True

    def add(self, assign: Assign) -> None:
        self.heard.append(assign)

    def cancel(self, request_id: int) -> None:
        self.heard.append(Cancel(request_id))


def forward_on(mailbox: Mailbox, said: list[Posted]) -> tuple[ForwardThread, Runner]:
    """Seated, and past its first boundary, at which it took in that all are there."""
    runner = Runner()
    mailbox.adopt(ALL)
    forward = ForwardThread(CONFIG, mailbox, said.append, cast(Any, None))
    forward.runner = cast(Any, runner)
    forward.exchange = cast(Any, SimpleNamespace(activate=lambda member: None))
    assert forward._take_seat()
    forward._settle_in()
    assert runner.routed == {0, 1}
    return forward, runner


def assign(request_id: int) -> Assign:
    return Assign(request_id, (1,), (), SamplingParams(1), 0, 0)


Act = list[Callable[[Mailbox], None]]
ACTS: dict[str, Act] = {
    "a view": [lambda box: box.adopt(WITHOUT)],
    "two views": [lambda box: box.adopt(WITHOUT), lambda box: box.adopt(JOINED)],
    "a placement": [lambda box: box.adopt_placement(FIRST)],
    "two placements": [lambda box: box.adopt_placement(FIRST), lambda box: box.adopt_placement(SECOND)],
    "a death": [lambda box: box.peer_died(PEER)],
    "a death, then the view without it": [lambda box: box.peer_died(PEER), lambda box: box.adopt(WITHOUT)],
    "a death, then its return": [lambda box: box.peer_died(PEER), lambda box: box.adopt(JOINED)],
    "a view and a placement": [lambda box: box.adopt(WITHOUT), lambda box: box.adopt_placement(FIRST)],
    "requests": [lambda box, one=one: box.deliver(one) for one in (assign(1), Cancel(1), assign(2))],  # type: ignore[misc]  # bound now
}


@pytest.mark.parametrize("act", ACTS.values(), ids=ACTS.keys())
def test_nothing_that_was_left_in_the_mailbox_is_forgotten(monkeypatch: pytest.MonkeyPatch, act: Act) -> None:
    """Two boundaries while it comes in, and one after: then all of it is taken in, in whatever order they ran."""
    shared = {"join_ready", "view", "placement", "_dead", "inbox"}
    monkeypatch.setattr(test_mailbox, "SHARED", shared)
    done = Mailbox()
    done.adopt(ALL)
    for leave in act:
        leave(done)
    tried = 0
    for choose in schedules():
        tried += 1
        mailbox = SteppedMailbox()
        said: list[Posted] = []
        forward, runner = forward_on(mailbox, said)

        def boundaries(forward: ForwardThread = forward) -> None:
            for _ in range(2):
                forward._settle_in()

        def control(mailbox: Mailbox = mailbox) -> None:
            for leave in act:
                leave(mailbox)

        interleave([boundaries, control], choose)
        forward._settle_in()
        expected = {seat.rank for seat in done.view.seats if not done.is_dead(seat.member)}
        assert forward._view == done.view, "a view is forgotten"
        assert runner.routed == expected, "a death or a return is forgotten"
        assert runner.placement == done.placement, "a placement is forgotten"
        assert runner.heard == list(done.inbox), "a request is forgotten, or comes twice, or out of order"
        seen = [item.version for item in said if isinstance(item, PlacementSeen)]
        assert seen[-1:] == ([done.placement.version] if done.placement else [])
        assert seen == sorted(set(seen))
    assert tried > 20
