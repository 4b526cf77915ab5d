"""A repair of many layers looks at few of them for each copy: the run process has the clients to serve meanwhile."""

from __future__ import annotations

from collections import deque

import pytest

from elastic_ep.machines.contract import Tick
from elastic_ep.machines.experts import events as ev
from elastic_ep.machines.experts import repair
from elastic_ep.machines.experts.moves import Layer
from elastic_ep.machines.experts.repair import RepairMachine
from elastic_ep.placement import launch_placement
from elastic_ep.timing import RepairConfig
from elastic_ep.wire.messages import Member

LAYERS, EXPERTS = 12, 32


def carry_out(machine: RepairMachine, members: list[Member]) -> tuple[int, int]:
    """Until nothing is left to do: how many copies and how many events it took."""
    events: deque[ev.Event] = deque([ev.MembersChanged(tuple(members))])
    copies = fed = 0
    while events or machine.next_deadline_ms() == machine.now_ms:
        effects = machine.step(events.popleft() if events else Tick(machine.now_ms))
        assert sum(isinstance(effect, ev.Replace) for effect in effects) <= 1, "a version each"
        for effect in effects:
            match effect:
                case ev.Order(member, ticket, layer, _, logical):
                    copies += 1
                    events.append(ev.Copied(member, ticket, 1000 * layer + logical, ""))
                case ev.Replace(changed):
                    events.extend(ev.Seen(member, changed.version) for member in sorted(machine.members))
        fed += 1
    return copies, fed


def test_few_layers_are_looked_at_for_each_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at: list[int] = []

    class Counting(Layer):
        def __post_init__(self) -> None:
            looked_at.append(self.number)
            super().__post_init__()

    monkeypatch.setattr(repair, "Layer", Counting)
    first, second, third, fourth = (Member(rank, 1) for rank in range(4))
    again = Member(2, 2)
    machine = RepairMachine(launch_placement(4, LAYERS, EXPERTS, EXPERTS))
    for members in ([first, second, third, fourth], [first, fourth], [first, Member(1, 2), again, fourth]):
        looked_at.clear()
        copies, _ = carry_out(machine, members)
        assert min(min(machine.placement.copies(layer, ranks_of(members))) for layer in range(LAYERS)) == (
            machine.floor(0)
        )
        # Once at the start; then where the copy was, where its slot's emptying was seen, and where the next one goes.
        assert len(looked_at) <= LAYERS + 4 * copies
    assert copies > LAYERS


def ranks_of(members: list[Member]) -> list[int]:
    return [member.rank for member in members]


def test_an_event_has_some_layers_looked_at_and_the_rest_is_a_ticks(monkeypatch: pytest.MonkeyPatch) -> None:
    layers, at_once = 50, 7
    looked_at: list[int] = []

    class Counting(Layer):
        def __post_init__(self) -> None:
            looked_at.append(self.number)
            super().__post_init__()

    class Stepping(RepairMachine):
        def step(self, event: ev.Event) -> list[ev.Effect]:
            looked_at.clear()
            effects = super().step(event)
            assert len(looked_at) <= at_once
            return effects

    monkeypatch.setattr(repair, "Layer", Counting)
    members = [Member(rank, 1) for rank in range(4)]
    machine = Stepping(launch_placement(4, layers, 8, 8, 2), RepairConfig(layers_at_once=at_once))
    carry_out(machine, members)
    copies, _ = carry_out(machine, members[1:])
    assert copies >= layers
    for layer in range(layers):
        assert min(machine.placement.copies(layer, (1, 2, 3))) == machine.floor(layer) == 2
