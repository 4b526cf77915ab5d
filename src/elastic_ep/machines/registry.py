"""The machines whose events are logged: how replay builds each one afresh."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from elastic_ep.machines.experts import events as repair_events
from elastic_ep.machines.experts.repair import RepairMachine
from elastic_ep.machines.membership import events as membership_events
from elastic_ep.machines.membership.machine import MembershipMachine
from elastic_ep.machines.membership.progress import ProgressMachine, Pulse
from elastic_ep.machines.rank import events as rank_events
from elastic_ep.machines.rank.machine import RankMachine
from elastic_ep.machines.requests import events as routing_events
from elastic_ep.machines.requests.events import RoutingConfig
from elastic_ep.machines.requests.routing import RoutingMachine
from elastic_ep.placement import Placement
from elastic_ep.timing import MembershipConfig, ProgressConfig, RepairConfig
from elastic_ep.wire.codec import from_plain, to_plain
from elastic_ep.wire.messages import Member


@dataclass(frozen=True, slots=True)
class Entry:
    """`build` takes what `arguments` gave for this machine; `event` is the type (or union) that it hears."""

    build: Callable[[dict[str, Any]], Any]
    event: Any


def arguments(
    membership: MembershipMachine, progress: ProgressMachine, routing: RoutingMachine, repair: RepairMachine
) -> dict[str, dict[str, Any]]:
    """What the log's first line says about each machine."""
    return {
        "membership": {
            "num_ranks": membership.num_ranks,
            "placement": to_plain(membership.placement),
            "config": to_plain(membership.config),
        },
        "progress": {"config": to_plain(progress.config)},
        "routing": {"config": to_plain(routing.config)},
        "repair": {"placement": to_plain(repair.placement), "config": to_plain(repair.config)},
    }


def _membership(plain: dict[str, Any]) -> MembershipMachine:
    placement: Placement = from_plain(plain["placement"], Placement)
    config: MembershipConfig = from_plain(plain["config"], MembershipConfig)
    return MembershipMachine(int(plain["num_ranks"]), placement, config)


def _repair(plain: dict[str, Any]) -> RepairMachine:
    placement: Placement = from_plain(plain["placement"], Placement)
    return RepairMachine(placement, from_plain(plain["config"], RepairConfig))


MACHINES: dict[str, Entry] = {
    "membership": Entry(_membership, membership_events.Event),
    "progress": Entry(lambda plain: ProgressMachine(from_plain(plain["config"], ProgressConfig)), Pulse),
    "routing": Entry(
        lambda plain: RoutingMachine(from_plain(plain["config"], RoutingConfig)), routing_events.Event
    ),
    "repair": Entry(_repair, repair_events.Event),
    "rank": Entry(lambda plain: RankMachine(Member(*map(int, plain["me"]))), rank_events.Event),
}
