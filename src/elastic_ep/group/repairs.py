"""The repair machine's shell: hears of slots and placements, orders copies, publishes placements."""

from __future__ import annotations

from collections.abc import Callable, Collection

import structlog

from elastic_ep.event_log.log import EventLog
from elastic_ep.group.audit import Proofs
from elastic_ep.group.expert_loads import LoadWindow
from elastic_ep.group.metrics import Metrics
from elastic_ep.machines.contract import Tick, UnexpectedEvent
from elastic_ep.machines.experts import events as ev
from elastic_ep.machines.experts.repair import RepairMachine
from elastic_ep.placement import Change, Placement
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
    """`on_placed` is told of every placement that was published, `on_plan_ended` how a plan came out.

    `on_deadline` is called whenever the machine's next deadline may be another.
    """

    def __init__(
        self,
        machine: RepairMachine,
        wire: ControllerWire,
        log: EventLog,
        metrics: Metrics,
        on_placed: Callable[[int, tuple[Change, ...]], None],
        on_deadline: Callable[[], None],
        now_ms: Callable[[], int],
    ) -> None:
        self.machine = machine
        self.on_plan_ended: Callable[[ev.PlanEnded], None] = lambda _ended: None
        self.states: dict[Member, StateReady] = {}
        """Whose memory can be read, and where."""
        self.unreadable = ""
        """Why weights come from the checkpoint alone, if they do."""
        self.loads = LoadWindow()
        self.proofs = Proofs(wire.send)
        self._now_ms = now_ms
        self._wire = wire
        self._log = log
        self._metrics = metrics
        self._pulls: set[int] = set()
        """Tickets of copies that were ordered from a peer."""
        self._on_placed = on_placed
        self._on_deadline = on_deadline

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
                    self._metrics.expert_copy_failed()
                    log.debug("an expert's copy was not made", rank=str(member), why=message.error)
                else:
                    self._metrics.expert_copied("peer" if pulled else "checkpoint")
                self.feed(ev.Copied(member, message.ticket, message.checksum, message.error))
            case SlotSums():
                self.feed(ev.Summed(member, message.sums))
                self.proofs.heard(member, message)
            case ExpertLoads():
                layers = len(self.placement.slots)
                if [len(row) for row in message.loads] != [self.placement.num_experts] * layers:
                    raise UnexpectedEvent("loads of other experts than there are")
                self.loads.add(member.rank, message.loads)

    def peer_weights(self) -> PeerWeights | None:
        """Where a joiner finds its weights; None if no member's can be read."""
        seated = sorted(self.machine.members & self.states.keys())
        states = [state for member in seated if (state := self.states[member]).address]
        if not states:
            return None
        known = self.machine.checksums
        placement = self.machine.placement
        checksums = tuple(
            tuple(known.get((layer, logical)) for logical in range(placement.num_experts))
            for layer in range(len(placement.slots))
        )
        peers = tuple(PeerAddress(s.rank, s.address) for s in states if s.address is not None)
        return PeerWeights(peers, states[0].dense_sum, checksums)

    def members_changed(self, members: Collection[Member]) -> None:
        self.feed(ev.MembersChanged(tuple(sorted(members))))
        self.proofs.members_changed(members)

    def gone(self, member: Member) -> None:
        self.states.pop(member, None)

    def feed(self, event: ev.Event) -> None:
        """Perform what the machine says. What must be heard at once goes out before anything is logged."""
        now = Tick(self._now_ms())
        for heard in (now, event) if now.now_ms > self.machine.now_ms else (event,):
            effects = self.machine.step(heard)
            for effect in effects:
                if isinstance(effect, ev.Replace):
                    self._wire.publish(effect.changed)
                elif isinstance(effect, ev.Order):
                    self._order(effect)
            self._log.record("repair", heard, effects)
            for effect in effects:
                self._conclude(effect)
        self._on_deadline()

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
                    self.proofs.sums.pop((change.layer, change.physical), None)
                self._on_placed(changed.version, changed.changes)
            case ev.Corrupt(layer, physical):
                rank = self.placement.rank_of(physical)
                log.error(
                    "an expert's bytes are wrong; it is made anew", rank=rank, layer=layer, slot=physical
                )
                self.proofs.corrupt.append((layer, physical))
            case ev.Recheck(member):
                self.proofs.ask([member])
            case ev.PlanEnded():
                self.on_plan_ended(effect)
