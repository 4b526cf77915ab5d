"""The membership protocol has no split, no broken promise and no dead end, within the bounds of `search.CASES`.

And the search is worth something: it finds each of the mistakes that the protocol's rules are there to prevent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from elastic_ep.machines.membership import events as ev
from elastic_ep.machines.membership.machine import MembershipMachine
from elastic_ep.machines.rank.machine import RankMachine
from elastic_ep.rank.mailbox import Mailbox
from elastic_ep.wire.messages import Abort, Beat, Numbered, Prepare
from tests.machines.membership_model import Bounds, Model
from tests.machines.search import CASES, Case


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_no_split_no_broken_promise_nothing_stuck(case: Case, record_property: Callable[..., None]) -> None:
    model, found = case.run()
    print(found)
    record_property("states", found.states)
    assert not found.violation, str(found)
    assert found.ends > 0, "no path came to its end"
    _assert_it_happened(case, model)


def _assert_it_happened(case: Case, model: Model) -> None:
    """A search that never got to the interesting states proves nothing."""
    everybody = [m for m in model.controllers if len(m.view.seats) == case.num_ranks]
    assert everybody, "never were all seated"
    assert any(each.in_step and len(each.begun[-1].active) == case.num_ranks for each in model.ranks)
    if case.bounds.relaunch:
        assert any(len(m.view.seats) < case.num_ranks for m in model.controllers if m.view.epoch > 1)
    if case.bounds.timeouts or (case.bounds.deaths and case.members < case.num_ranks):
        aborts = [message for message in model.messages if isinstance(message, Abort)]
        assert aborts, "no attempt was ever aborted"
    if case.bounds.work_changes:
        assert any(m.group_state is ev.GroupState.PAUSED for m in model.controllers)
    if case.bounds.drains:
        left = any(m.view.left for m in model.controllers)
        assert left is bool(case.redundant), "who has an expert's last copy stays"
    elif case.redundant == 0:
        assert any(m.group_state is ev.GroupState.HOLDING for m in model.controllers)


TWO_AND_A_JOINER = Case("mutant", 3, 2, Bounds(max_step=1))


def test_counting_a_promise_of_another_attempt_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    count = MembershipMachine._on_promised

    def count_any(self: MembershipMachine, event: ev.Promised) -> None:
        if self.attempt is not None:
            event = replace(event, attempt=self.attempt.number)
        count(self, event)

    monkeypatch.setattr(MembershipMachine, "_on_promised", count_any)
    for bounds in (Bounds(1, timeouts=1), Bounds(1, deaths=1)):
        _, found = replace(TWO_AND_A_JOINER, bounds=bounds).run()
        assert found.violation.startswith("split: step 1 runs with"), str(found)
        assert len(found.trace) < 25, "breadth first finds a short one"


def test_releasing_the_hold_on_a_stale_abort_breaks_a_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    hear = RankMachine._on_numbered

    def hear_stale(self: RankMachine, event: Numbered) -> None:
        if self.number is not None and event.number <= self.number and not isinstance(event.body, Beat):
            self._apply(event.body)
        else:
            hear(self, event)

    monkeypatch.setattr(RankMachine, "_on_numbered", hear_stale)
    _, found = replace(TWO_AND_A_JOINER, bounds=Bounds(1, deaths=1, losses=1)).run()
    assert "having promised" in found.violation, str(found)


def test_promising_twice_breaks_the_first_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    prepare = RankMachine._prepare

    def prepare_again(self: RankMachine, message: Prepare) -> None:
        self.attempt = None
        prepare(self, message)

    monkeypatch.setattr(RankMachine, "_prepare", prepare_again)
    _, found = replace(TWO_AND_A_JOINER, bounds=Bounds(1, deaths=1, losses=1)).run()
    assert "having promised" in found.violation, str(found)


def test_not_holding_breaks_the_promise(monkeypatch: pytest.MonkeyPatch) -> None:
    promise = Mailbox.promise

    def promise_only(self: Mailbox) -> int:
        step = promise(self)
        self.release()
        return step

    monkeypatch.setattr(Mailbox, "promise", promise_only)
    _, found = TWO_AND_A_JOINER.run()
    assert "having promised" in found.violation, str(found)


def test_not_aborting_when_a_joiner_dies_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MembershipMachine, "_abort", lambda self: None)
    _, found = replace(TWO_AND_A_JOINER, bounds=Bounds(1, deaths=1)).run()
    assert found.violation == "controller: awaits a stranger", str(found)


def test_a_rank_that_does_not_end_when_it_has_left_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RankMachine, "_stop", lambda self: None)
    case = Case("mutant", 2, 2, Bounds(max_step=1, drains=1))
    _, found = case.run()
    assert not found.violation, str(found)
    monkeypatch.setattr(MembershipMachine, "_fence", lambda self, record, reason: None)
    _, found = case.run()
    assert found.violation.startswith("stuck: "), str(found)


def test_not_masking_the_lost_gets_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RankMachine, "_mask", lambda self, member: None)
    _, found = replace(TWO_AND_A_JOINER, bounds=Bounds(1, deaths=1)).run()
    assert found.violation.startswith("stuck: "), str(found)


def test_holding_for_ever_gets_stuck(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RankMachine, "_end_attempt", lambda self: None)
    _, found = replace(TWO_AND_A_JOINER, bounds=Bounds(2)).run()
    assert found.violation.startswith("stuck: "), str(found)
