"""The request table: every path that a request may take, and none that it must not."""

from __future__ import annotations

import pytest

from elastic_ep.machines.contract import UnexpectedEvent
from elastic_ep.machines.requests.lifecycle import REQUEST, RequestState
from elastic_ep.machines.tables import TableMachine


@pytest.mark.parametrize(
    ("triggers", "end"),
    [
        (["assign", "finish"], RequestState.FINISHED),
        (["assign", "rank_lost", "assign", "rank_lost", "assign", "finish"], RequestState.FINISHED),
        (["cancel"], RequestState.CANCELLED),
        (["assign", "cancel"], RequestState.CANCELLED),
        (["assign", "rank_lost", "cancel"], RequestState.CANCELLED),
        (["fail"], RequestState.FAILED),
        (["assign", "fail"], RequestState.FAILED),
        (["assign", "rank_lost", "fail"], RequestState.FAILED),
    ],
)
def test_lives(triggers: list[str], end: RequestState) -> None:
    machine = TableMachine(REQUEST)
    for trigger in triggers:
        assert not machine.final
        assert machine.fire(trigger)
    assert machine.state is end
    assert machine.final


def test_an_end_is_final() -> None:
    for state in REQUEST.final:
        for trigger in REQUEST.triggers:
            with pytest.raises(UnexpectedEvent):
                TableMachine(REQUEST, state).fire(trigger)


@pytest.mark.parametrize("state", [RequestState.QUEUED, RequestState.REPLAYING])
def test_nothing_finishes_without_a_rank(state: RequestState) -> None:
    with pytest.raises(UnexpectedEvent):
        TableMachine(REQUEST, state).fire("finish")


def test_every_state_can_be_reached() -> None:
    reached = {REQUEST.initial}
    for _ in REQUEST.states:
        reached |= {row.dest for row in REQUEST.rows if row.dest and reached.intersection(row.source)}
    assert reached == set(REQUEST.states)
