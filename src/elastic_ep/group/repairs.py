"""The repair machine's shell: hears of slots and placements, orders copies, publishes placements."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import anyio
import structlog

from elastic_ep.event_log.log import EventLog
from elastic_ep.group.audit import Audit
from elastic_ep.group.expert_loads import LoadWindow
from elastic_ep.group.hub import Hub
from elastic_ep.group.metrics import Metrics
from elastic_ep.machines.contract import UnexpectedEvent
from elastic_ep.machines.experts import events as ev
from elastic_ep.machines.experts.planner import Plan
from elastic_ep.machines.experts.repair import RepairMachine
from elastic_ep.machines.membership.events import Placed
from elastic_ep.placement import Placement
from elastic_ep.weights.layout import of_layer
from elastic_ep.wire.messages import Member
from elastic_ep.wire.slot_messages import (
    CopySlot,
    ExpertLoads,
    PeerAddress,
    PeerWeights,
    PlacementSeen,
    SlotCopied,
    SlotSums,
    StateReady,
)
from elastic_ep.wire.sockets import ControllerWire

log = structlog.get_logger()
FromSlots = PlacementSeen | StateReady | SlotCopied | SlotSums | ExpertLoads


class Repairs:
    """The membership machine hears of every placement that is published."""

    def __init__(
        self, hub: Hub, machine: RepairMachine, wire: ControllerWire, log: EventLog, metrics: Metrics
    ) -> None:
        self.machine = machine
        self.states: dict[Member, StateReady] = {}
        """Whose memory can be read, and where."""
        self.unreadable = ""
        """Why weights come from the checkpoint alone, if they do."""
        self.loads = LoadWindow()
        self.audit = Audit(wire.send)
        self._hub = hub
        self._wire = wire
        self._log = log
        self._metrics = metrics
        self._pulls: set[int] = set()
        """Tickets of copies that were ordered from a peer."""
        self._plans = 0
        self._plan_ended = anyio.Event()
        self._outcome = ev.PlanEnded(0, 0)
        hub.attach("repair", machine, self)

    @property
    def placement(self) -> Placement:
        return self.machine.placement

    def heard(self, member: Member, message: FromSlots) -> None:
        """Raises `UnexpectedEvent`, with nothing changed, for what no rank can have to say."""
        match message:
            case PlacementSeen():
                self.feed(ev.Seen(member, message.version))
            case StateReady():
                if message.address is None:
                    if not self.unreadable:
                        log.info("weights come from the checkpoint, not from peers", why=message.reason)
                    self.unreadable = message.reason
                    self._log.note("no_peer_weights", rank=member.rank, reason=message.reason)
                else:
                    self.states[member] = message
                    if message.pulled:
                        self._log.note("weights_from_peers", rank=member.rank, experts=message.pulled)
                        self._metrics.expert_copied("peer", message.pulled)
                    self.feed(ev.Reachable(member))
            case SlotCopied():
                pulled = message.ticket in self._pulls
                self._pulls.discard(message.ticket)
                if message.error:
                    self._metrics.failed_copies.inc()
                    log.debug("an expert's copy was not made", rank=str(member), why=message.error)
                else:
                    self._metrics.expert_copied("peer" if pulled else "checkpoint")
                self.feed(ev.Copied(member, message.ticket, message.checksum, message.error))
            case SlotSums():
                self.feed(ev.Summed(member, message.sums))
                self.audit.answered(member, message)
            case ExpertLoads():
                layers = len(self.placement.slots)
                if [len(row) for row in message.loads] != [self.placement.num_experts] * layers:
                    raise UnexpectedEvent("loads of other experts than there are")
                self.loads.add(member.rank, message.loads)

    def peer_weights(self, members: Collection[Member]) -> PeerWeights | None:
        """Where a joiner finds its weights; None if the memory of none of `members` can be read."""
        seated = sorted(self.machine.members & self.states.keys() & set(members))
        found = [(member.rank, state) for member in seated if (state := self.states[member]).address]
        if not found:
            return None
        known = self.machine.checksums
        placement = self.machine.placement
        checksums = tuple(
            tuple(known.get((layer, logical)) for logical in range(placement.num_experts))
            for layer in range(len(placement.slots))
        )
        peers = tuple(PeerAddress(rank, s.address) for rank, s in found if s.address is not None)
        return PeerWeights(peers, found[0][1].dense_sum, checksums)

    def members_changed(self, members: Collection[Member], leaving: Collection[Member] = ()) -> None:
        self.feed(ev.MembersChanged(tuple(sorted(members)), tuple(sorted(leaving))))
        self.audit.members_changed(members)

    def gone(self, member: Member) -> None:
        self.states.pop(member, None)

    def feed(self, event: ev.Event) -> None:
        self._hub.post("repair", event)

    async def carry_out(self, members: tuple[Member, ...], found: Plan, deadline_s: float) -> ev.PlanEnded:
        """How the plan came out, or what can be said of it after so long.

        HAZARD: the plan before may be under way still, its asker gone; this one ends it, and hears of that end too.
        """
        self._plans += 1
        self._plan_ended = anyio.Event()
        self._outcome = ev.PlanEnded(0, found.moves, self._plans)
        self.feed(ev.Planned(members, found.slots, self._plans))
        with anyio.move_on_after(deadline_s):
            await self._plan_ended.wait()
        return self._outcome

    # What the hub calls

    def at_once(self, effects: Sequence[ev.Effect]) -> None:
        for effect in effects:
            if isinstance(effect, ev.Replace):
                self._wire.publish(effect.changed)
            elif isinstance(effect, ev.Order):
                self._order(effect)

    def perform(self, event: ev.Event, effects: Sequence[ev.Effect]) -> None:
        for effect in effects:
            self._conclude(effect)

    def _order(self, order: ev.Order) -> None:
        origin = order.origin
        state = self.states.get(origin.member) if origin else None
        copy = CopySlot(
            order.ticket,
            order.layer,
            order.physical,
            order.logical,
            order.checksum,
            origin.physical if origin and state else None,
            of_layer(state.address, order.layer) if state and state.address else None,
        )
        if state:
            self._pulls.add(order.ticket)
        self._wire.send(order.member, copy)

    def _conclude(self, effect: ev.Effect) -> None:
        match effect:
            case ev.Replace(changed):
                for change in changed.changes:
                    self.audit.sums.pop((change.layer, change.physical), None)
                self._hub.post("membership", Placed(changed.version, changed.changes))
            case ev.Corrupt(layer, physical):
                rank = self.placement.rank_of(physical)
                log.error(
                    "an expert's bytes are wrong; it is made anew", rank=rank, layer=layer, slot=physical
                )
                self.audit.corrupt.append((layer, physical))
            case ev.Recheck(member):
                self.audit.ask([member])
            case ev.PlanEnded(plan=plan) if plan == self._plans:
                self._outcome = effect
                self._plan_ended.set()
