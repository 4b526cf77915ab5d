"""The machines whose events are logged: how replay builds each one afresh."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from elastic_ep.machines.experts import events as repair_events
from elastic_ep.machines.experts.repair import RepairMachine
from elastic_ep.machines.membership import events as membership_events
from elastic_ep.machines.membership.machine import MembershipMachine
from elastic_ep.machines.membership.progress import ProgressMachine, Pulse
from elastic_ep.machines.rank import events as rank_events
from elastic_ep.machines.rank.machine import RankMachine
from elastic_ep.machines.requests import events as routing_events
from elastic_ep.machines.requests.routing import RoutingMachine
from elastic_ep.placement import Placement
from elastic_ep.timing import MembershipConfig, ProgressConfig, RepairConfig
from elastic_ep.wire.codec import from_plain, to_plain
from elastic_ep.wire.messages import Member


class Entry:
    """`event` is the type (or union) that the machine hears, `takes` what it is made of: fields and their types."""

    def __init__(self, machine: Any, event: Any, **takes: Any) -> None:
        self.event = event
        self.takes = takes
        self._machine = machine

    def build(self, plain: Mapping[str, Any]) -> Any:
        """From what `arguments` gave for it. Raises KeyError, TypeError and ValueError."""
        return self._machine(**{name: from_plain(plain[name], kind) for name, kind in self.takes.items()})


MACHINES = {
    "membership": Entry(
        MembershipMachine,
        membership_events.Event,
        num_ranks=int,
        placement=Placement,
        config=MembershipConfig,
    ),
    "progress": Entry(ProgressMachine, Pulse, config=ProgressConfig),
    "routing": Entry(RoutingMachine, routing_events.Event, config=routing_events.RoutingConfig),
    "repair": Entry(RepairMachine, repair_events.Event, placement=Placement, config=RepairConfig),
    "rank": Entry(RankMachine, rank_events.Event, me=Member),
}


def arguments(machines: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What the log's first line says about each machine, by name."""
    return {
        name: {field: to_plain(getattr(machine, field)) for field in MACHINES[name].takes}
        for name, machine in machines.items()
    }
