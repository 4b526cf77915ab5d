"""What machines have in common: they compare by state, and what they raise tells what they heard."""

from __future__ import annotations

import copy
import traceback

import pytest

from elastic_ep.machines.contract import UnexpectedEvent
from elastic_ep.machines.machine import REMEMBERED
from elastic_ep.machines.requests import events as ev
from elastic_ep.machines.requests.routing import RoutingMachine
from elastic_ep.wire.messages import Member, SamplingParams, Token

RANK = Member(0, 1)
SECRET = 4711


def routing(tokens: int = 0) -> RoutingMachine:
    machine = RoutingMachine(ev.RoutingConfig(2, 1024))
    machine.step(ev.RankUp(RANK))
    machine.step(ev.Submitted(ev.NewRequest(0, (SECRET,) * 3, SamplingParams(100), SECRET, 0)))
    for index in range(tokens):
        machine.step(ev.TokensCommitted(RANK, (Token(0, index, SECRET),), index, 0, 0))
    return machine


def story(error: BaseException) -> list[str]:
    return error.__notes__


def test_machines_are_equal_when_their_states_are() -> None:
    one, other = routing(2), routing(2)
    assert one == other
    other.step(ev.TokensCommitted(RANK, (Token(0, 2, SECRET),), 2, 0, 0))
    assert one != other
    assert one != RoutingMachine(one.config)
    with pytest.raises(TypeError, match="unhashable"):
        hash(one)


def test_a_refused_event_tells_the_last_ones_and_no_text() -> None:
    machine = routing(tokens=40)
    with pytest.raises(UnexpectedEvent) as caught:
        machine.step(ev.RankUp(RANK))
    *heard, refused = story(caught.value)
    assert len(heard) == REMEMBERED
    assert all("TokensCommitted" in line and "Deliver" in line for line in heard)
    assert "RankUp" in refused
    assert refused in "".join(traceback.format_exception(caught.value)), "a logged traceback has it"
    assert str(SECRET) not in "".join(story(caught.value))


def test_the_prompt_is_not_told() -> None:
    machine = routing()
    with pytest.raises(UnexpectedEvent) as caught:
        machine.step(ev.Submitted(ev.NewRequest(0, (SECRET,) * 3, SamplingParams(100), SECRET, 0)))
    assert len([line for line in story(caught.value) if "Submitted" in line]) == 2
    assert str(SECRET) not in "".join(story(caught.value))


def test_long_events_are_cut() -> None:
    machine = routing()
    tokens = tuple(Token(0, index, SECRET) for index in range(99))
    machine.step(ev.TokensCommitted(RANK, tokens, 1, 0, 0))
    with pytest.raises(UnexpectedEvent) as caught:
        machine.step(ev.RankUp(RANK))
    assert max(map(len, story(caught.value))) < 1000


def test_a_broken_invariant_tells_the_last_events() -> None:
    machine = routing(tokens=1)
    machine.requests.clear()
    with pytest.raises(AssertionError) as caught:
        machine.check()
    assert "TokensCommitted" in story(caught.value)[-1]


def test_a_copy_has_a_story_of_its_own() -> None:
    machine = routing(tokens=1)
    twin = copy.deepcopy(machine)
    assert twin == machine
    with pytest.raises(UnexpectedEvent) as caught:
        twin.step(ev.RankUp(RANK))
    assert len(story(caught.value)) == 1
