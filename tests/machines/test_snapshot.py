"""A machine restored from any state, with the clients' text or without it, goes on as the machine did.

The machines' own tests are run once more. Before each event two fresh machines are restored from the
machine's state, one as a log with text tells it, one as a log without; all three hear the event.
"""

from __future__ import annotations

import inspect
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields
from typing import Any

import pytest
from hypothesis import Phase, settings
from hypothesis.stateful import run_state_machine_as_test

from elastic_ep.machines.contract import UnexpectedEvent
from elastic_ep.machines.experts.repair import RepairMachine
from elastic_ep.machines.membership.machine import MembershipMachine
from elastic_ep.machines.membership.progress import ProgressMachine
from elastic_ep.machines.registry import MACHINES
from elastic_ep.machines.requests import events as routing
from elastic_ep.machines.requests.routing import RoutingMachine
from elastic_ep.machines.snapshot import MalformedState, State, restore
from elastic_ep.machines.snapshot import to_plain as state_to_plain
from elastic_ep.placement import EMPTY, launch_placement
from elastic_ep.timing import RepairConfig
from elastic_ep.wire.codec import from_plain
from elastic_ep.wire.messages import Member, SamplingParams
from elastic_ep.wire.privacy import blanks, expanded, without_text
from tests.machines import test_membership, test_progress, test_repair, test_routing

MACHINE_TYPES: dict[str, Any] = {
    "membership": MembershipMachine,
    "progress": ProgressMachine,
    "repair": RepairMachine,
    "routing": RoutingMachine,
}
MODULES = {
    "membership": test_membership,
    "progress": test_progress,
    "repair": test_repair,
    "routing": test_routing,
}
STORIES: dict[str, Any] = {
    "membership": test_membership.AnyOrder,
    "repair": test_repair.Repairs,
    "routing": test_routing.RoutingUnderFaults,
}


def _tests(name: str) -> Iterator[Callable[[], None]]:
    """The machine's own, as far as they need nothing from pytest."""
    for value in vars(MODULES[name]).values():
        if not inspect.isfunction(value) or not value.__name__.startswith("test_"):
            continue
        if hasattr(value, "hypothesis") or not inspect.signature(value).parameters:
            yield value
    if name in STORIES:
        yield lambda: _run(STORIES[name])
    if name == "repair":
        yield _busy_repairs


def _busy_repairs() -> None:
    """With one copy at a time, so that layers wait for members."""
    config = RepairConfig(copies_in_flight=1, ranks_per_planned_copy=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            test_repair, "RepairMachine", lambda placement, _config: RepairMachine(placement, config)
        )
        _run(test_repair.Repairs)


def _run(machine: Any) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=25, stateful_step_count=50, deadline=None, derandomize=True, phases=[Phase.generate]
        ),
    )


def through_json(value: Any) -> Any:
    return json.loads(json.dumps(value), object_hook=expanded)


def restored(machine: Any, plain: Any) -> Any:
    """A fresh machine of the same kind, in the state that `plain` tells of."""
    fresh = type(machine)(*[getattr(machine, field.name) for field in fields(machine)])
    restore(fresh, through_json(plain))
    return fresh


def said(step: Callable[[Any, Any], list[Any]], machine: Any, event: Any) -> list[Any] | str:
    try:
        return step(machine, event)
    except UnexpectedEvent as error:
        return str(error)


@pytest.fixture
def watched(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many events of each kind were heard by machines of this name, and by their twins."""
    name: str = request.param
    cls, event_type = MACHINE_TYPES[name], MACHINES[name].event
    step = cls.step
    heard: Counter[str] = Counter()
    calls, every = [0], 4 if name == "progress" else 1  # whose tests run for thousands of pulses

    def step_beside_twins(self: Any, event: Any) -> list[Any]:
        calls[0] += 1
        if calls[0] % every or getattr(self, "placement", EMPTY) is None:  # a test takes it away
            return step(self, event)  # type: ignore[no-any-return]
        state = self.state()
        twin = restored(self, state_to_plain(state))
        assert twin == self
        without = restored(self, state_to_plain(state, blanks))
        effects = said(step, self, event)
        assert said(step, twin, event) == effects
        assert twin == self
        for passing in ("_changes", "_effects"):  # made anew by every event, whatever it was
            assert isinstance(effects, str) or getattr(twin, passing, 0) == getattr(self, passing, 0)
        blank_event = from_plain(through_json(without_text(event)), event_type)
        assert without_text(said(step, without, blank_event)) == without_text(effects)
        after = through_json(state_to_plain(self.state(), blanks))
        assert through_json(state_to_plain(without.state())) == after
        heard[type(event).__name__] += 1
        if isinstance(effects, str):
            raise UnexpectedEvent(effects)
        return effects

    monkeypatch.setattr(cls, "step", step_beside_twins)
    return heard


@pytest.mark.parametrize(
    ("name", "watched"), [(name, name) for name in MACHINE_TYPES], indirect=["watched"], ids=MACHINE_TYPES
)
@pytest.mark.timeout(300)
def test_a_restored_machine_goes_on_as_the_machine_did(name: str, watched: Counter[str]) -> None:
    for test in _tests(name):
        test()
    assert sum(watched.values()) > 300


def routed() -> RoutingMachine:
    machine = RoutingMachine(routing.RoutingConfig(2, 1024))
    machine.step(routing.RankUp(Member(0, 1)))
    for number in range(4):
        request = routing.NewRequest(number, (11, 12, 13), SamplingParams(5), 7, 0)
        machine.step(routing.Submitted(request))
    return machine


def test_one_request_is_one_thing_wherever_it_is_found() -> None:
    machine = restored(routed(), state_to_plain(routed().state()))
    assert machine.requests[0] is machine.ranks[Member(0, 1)].requests[0]
    assert machine.requests[3] is machine.waiting[3]


def test_a_state_does_not_change_afterwards_and_tells_machines_apart() -> None:
    machine = routed()
    before, same = machine.state(), routed().state()
    machine.step(routing.RankDown(Member(0, 1), "killed"))
    assert before == same != machine.state()
    assert hash(before) == hash(same)


def parts(plain: Any) -> Iterator[tuple[Any, Any]]:
    """Every container of a plain state, and each key or index in it."""
    if isinstance(plain, dict | list):
        for key, value in list(plain.items() if isinstance(plain, dict) else enumerate(plain)):
            yield plain, key
            yield from parts(value)


FORGED: tuple[Any, ...] = (
    {}, [], "x", 1 << 40, None, {"Popen": ["x"]}, {"Again": [99]}, {"RankState": "x"},
)  # fmt: skip


def test_a_forged_state_is_refused_or_is_a_state() -> None:
    """Whatever is changed in it: nothing but the one exception, and no other code than the machines'."""
    plain = through_json(state_to_plain(routed().state()))
    for place in range(sum(1 for _ in parts(plain))):
        for forged in FORGED:
            changed = through_json(plain)
            container, key = list(parts(changed))[place]
            container[key] = forged
            fresh = RoutingMachine(routing.RoutingConfig(2, 1024))
            try:
                restore(fresh, changed)
            except MalformedState:
                continue


def test_a_machine_that_holds_what_nobody_can_write_down_is_refused() -> None:
    machine = routed()
    machine.__dict__["_new"] = object()
    with pytest.raises(TypeError, match="a machine holds a object"):
        machine.state()


def test_states_name_their_machine() -> None:
    placement = launch_placement(2, 1, 4, 4)
    assert isinstance(MembershipMachine(2, placement).state(), State)
    assert MembershipMachine(2, placement) != RepairMachine(placement)
