"""The real controller, repairs and router around ranks that live on the same event loop and do as they are told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from elastic_ep.gateway.router import Router
from elastic_ep.group.clock import Clock
from elastic_ep.group.controller import Controller
from elastic_ep.group.hub import Hub
from elastic_ep.group.metrics import Metrics
from elastic_ep.group.repairs import Repairs
from elastic_ep.machines.experts.repair import RepairMachine
from elastic_ep.machines.membership.events import Start
from elastic_ep.machines.membership.machine import MembershipMachine
from elastic_ep.machines.membership.progress import ProgressMachine, Starved
from elastic_ep.machines.rank import events as rk
from elastic_ep.machines.rank.machine import RankMachine
from elastic_ep.machines.requests.events import RoutingConfig
from elastic_ep.machines.requests.routing import RoutingMachine
from elastic_ep.placement import EMPTY, Placement, launch_placement
from elastic_ep.rank.mailbox import Mailbox
from elastic_ep.timing import USUAL, MembershipConfig, RepairConfig
from elastic_ep.wire.host_messages import Launched
from elastic_ep.wire.messages import (
    Beat,
    Drain,
    Hello,
    Member,
    Numbered,
    Promise,
    Published,
    RankReport,
    RankState,
    Resume,
    Shutdown,
    Snapshot,
    SnapshotRequest,
)
from elastic_ep.wire.slot_messages import (
    CopySlot,
    PeerWeights,
    PlacementSeen,
    SlotCopied,
    SlotSum,
    SlotSums,
    StateAddress,
    StateReady,
    SumSlots,
)
from tests.kit.virtual_time import VirtualTimeLoop

SPOILT = 1_000_000
Place = tuple[int, int]
"""(layer, physical expert)"""


def checksum_of(layer: int, content: int) -> int:
    return 1000 * layer + content


class FakeLog:
    private = False

    def __init__(self) -> None:
        self.notes: list[tuple[str, dict[str, Any]]] = []
        self.recorded: list[tuple[str, Any, Sequence[Any]]] = []

    def note(self, kind: str, /, **facts: Any) -> None:
        self.notes.append((kind, facts))

    def record(self, machine: str, event: object, effects: Sequence[object], cause: int = 0) -> None:
        self.recorded.append((machine, event, effects))

    def effects(self, kind: type) -> list[Any]:
        return [effect for _, _, effects in self.recorded for effect in effects if isinstance(effect, kind)]


class FakeRank:
    """A rank's control loop with the real rank machine; its steps, bytes and copies are a table."""

    def __init__(self, group: FakeGroup, member: Member) -> None:
        self.group = group
        self.member = member
        self.machine = RankMachine(member)
        self.mailbox = Mailbox()
        self.alive = True
        self.asking = False
        """For a snapshot, at its own pace."""
        self.told: list[Any] = []
        """What it alone was told."""
        self.silent = False
        """Alive, and neither hears nor says anything."""
        self.contents: dict[Place, int] = {}
        """What lies in this rank's slots: the expert's number, for the bytes that are right."""
        placement = group.controller.repairs.placement
        for layer in range(len(placement.slots)):
            for slot, logical in enumerate(placement.on_rank(layer, member.rank)):
                self.contents[layer, member.rank * placement.slots_per_rank + slot] = logical

    def start(self) -> None:
        self.say(Hello(1000 + self.member.rank))
        for event in (rk.Started(), rk.EngineReady(), rk.WarmedUp()):
            self._step(event)
        self.say(StateReady(StateAddress(f"host:{self.member.rank}", ()), dense_sum=0))
        self._synchronise()

    def say(self, message: Any) -> None:
        self.group.carry(self.member, message)

    def _synchronise(self) -> None:
        self.asking = self.alive and not self.machine.synchronised
        if self.asking:
            self.say(SnapshotRequest())
            self.group.loop.call_later(USUAL.sync_retry_ms / 1000, self._synchronise)

    def hear(self, message: Any) -> None:
        if self.alive and not self.silent:
            self._hear(message)

    def _hear(self, message: Any) -> None:
        if not isinstance(message, Numbered):
            self.told.append(message)
        match message:
            case Numbered() | Snapshot():
                self._step(message)
            case SumSlots(ticket):
                self.say(SlotSums(ticket, self._sums()))
            case CopySlot():
                self.group.ordered(self, message)
            case Shutdown() | Drain() | Resume():
                self._step(message)

    def _step(self, event: rk.Event) -> None:
        for effect in self.machine.step(event):
            match effect:
                case rk.AskSnapshot():
                    if not self.asking:
                        self.asking = True
                        self.group.loop.call_later(USUAL.sync_retry_ms / 1000, self._synchronise)
                case rk.MakePromise(attempt, seated):
                    self.say(Promise(attempt, self.mailbox.promise() if seated else 0))
                case rk.AdoptPlacement(placement):
                    self.say(PlacementSeen(placement.version))
                case RankReport():
                    self.say(effect)
                case rk.StopSteps():
                    self._step(rk.StepsEnded())
                    self.group.end(self.member, "exit status 0")
                case rk.Expelled():
                    self.group.end(self.member, "expelled")

    def _sums(self) -> tuple[SlotSum, ...]:
        return tuple(SlotSum(*place, checksum_of(place[0], held)) for place, held in self.contents.items())

    def copy(self, order: CopySlot, error: str = "", spoil: int = 0) -> None:
        """Carry out the order: from another rank's memory if it names one."""
        if not self.alive:
            return
        content = order.logical
        if order.origin is not None:
            placement = self.group.controller.repairs.placement
            source = self.group.ranks.get(placement.rank_of(order.origin))
            if source is None or not source.alive:
                error = error or "the source is gone"
            else:
                content = source.contents[order.layer, order.origin]
        content += spoil
        checksum = checksum_of(order.layer, content)
        if not error and order.checksum in (None, checksum):
            self.contents[order.layer, order.physical] = content
        done = SlotCopied(order.ticket, 0 if error else checksum, error)
        self.group.copied(self, order, done)
        self.say(done)


class FakeWire:
    """`ControllerWire`, to the ranks of a `FakeGroup`. `loses` says which message a rank does not get."""

    def __init__(self, group: FakeGroup) -> None:
        self._group = group
        self.number = 0
        self.dropped = 0

    def publish(self, body: Published) -> None:
        if not isinstance(body, Beat):
            self.number += 1
        message = Numbered(self.number, body)
        for rank in list(self._group.ranks.values()):
            self._group.deliver(rank, message)

    def send(self, member: Member, message: Any) -> None:
        rank = self._group.ranks.get(member.rank)
        if rank is not None and rank.member == member:
            self._group.deliver(rank, message)


@dataclass
class FakeProcesses:
    group: FakeGroup
    launched: list[Member] = field(default_factory=list)
    fenced: list[Member] = field(default_factory=list)
    watched: list[Member] = field(default_factory=list)
    held: list[Member] = field(default_factory=list)
    occupied: dict[int, list[Callable[[], None]]] = field(default_factory=dict)
    """By rank, who waits until its device is free; ranks that are not named are."""
    unheard: list[Callable[[], None]] = field(default_factory=list)
    """What the agent has said."""

    def launch(self, member: Member, placement: Placement, peers: PeerWeights | None) -> None:
        self.launched.append(member)
        self.group.loop.call_soon(self.group.begin, member)

    def fence(self, member: Member) -> None:
        self.fenced.append(member)
        self.group.loop.call_soon(self.group.end, member, "SIGKILL")

    def watch(self, member: Member) -> None:
        self.watched.append(member)

    def hear(self) -> None:
        while self.unheard:
            self.unheard.pop(0)()

    async def starved(self, pids: Mapping[Member, int]) -> tuple[Starved, ...]:
        return ()

    def keep_device(self, member: Member, pid: int) -> None:
        self.held.append(member)

    def gone(self, member: Member) -> None:
        pass

    def when_free(self, rank: int, then: Callable[[], None]) -> None:
        if rank in self.occupied:
            self.occupied[rank].append(then)
        else:
            then()

    def free(self, rank: int) -> None:
        for then in self.occupied.pop(rank):
            then()


class FakeGroup:
    """`ranks` are those of the newest launches. Needs a running `VirtualTimeLoop`.

    `loses(rank, message)`: whether a message to this rank is lost. `ordered(rank, order)`: what becomes of an order
    to copy; by default it is carried out at once. `copied` is told of the outcome.
    """

    def __init__(
        self,
        loop: VirtualTimeLoop,
        ranks: int = 3,
        experts: int = 4,
        redundant: int = 4,
        spare: int = 0,
        layers: int = 2,
        **membership: int,
    ) -> None:
        self.loop = loop
        self.ranks: dict[int, FakeRank] = {}
        self.log = FakeLog()
        self.steps: list[int] = []
        self.processes = FakeProcesses(self)
        self.loses: Callable[[FakeRank, Any], bool] = lambda _rank, _message: False
        self.ordered: Callable[[FakeRank, CopySlot], None] = lambda rank, order: rank.copy(order)
        self.copied: Callable[[FakeRank, CopySlot, SlotCopied], None] = lambda _rank, _order, _done: None
        self.wire = FakeWire(self)
        placement = launch_placement(ranks, layers, experts, redundant, spare)
        clock = Clock(lambda: loop.time() * 1000)
        hub = Hub(self.log.record, clock.now_ms)
        requests = RoutingMachine(RoutingConfig(max_num_seqs=2, max_queued=8, request_timeout_ms=20_000))
        log, metrics = cast(Any, self.log), Metrics()
        repairs = Repairs(hub, RepairMachine(placement, RepairConfig()), cast(Any, self.wire), log, metrics)
        self.metrics = metrics
        self.controller = Controller(
            hub,
            clock,
            MembershipMachine(ranks, placement, MembershipConfig(**membership)),
            ProgressMachine(),
            requests,
            repairs,
            self.processes,
            cast(Any, self.wire),
            log,
            metrics,
            on_step=self.steps.append,
        )
        self.router = Router(
            hub,
            requests,
            send=cast(Any, self.wire.send),
            notify=self.notified,
            taken_over=self.controller.ledger.taken_over,
        )

    def notified(self, notice: Any) -> None:
        self.controller.on_notice(notice)

    # What happens to ranks

    def launch(self) -> None:
        self.controller.feed(Start())

    def begin(self, member: Member) -> None:
        rank = self.ranks[member.rank] = FakeRank(self, member)
        self.controller.on_process(Launched(member, 1000 + member.rank))
        rank.start()

    def end(self, member: Member, status: str, cause: str = "pidfd") -> None:
        """The process ends, and the controller hears of it."""
        rank = self.ranks.get(member.rank)
        if rank is None or rank.member != member or not rank.alive:
            return
        rank.alive = False
        self.controller.on_death(member, cause, int(self.loop.time() * 1e9))
        self.controller.on_gone(member, status)

    def kill(self, number: int) -> Member:
        member = self.ranks[number].member
        self.end(member, "SIGKILL")
        return member

    # What passes between them

    def deliver(self, rank: FakeRank, message: Any) -> None:
        if not self.loses(rank, message):
            self.loop.call_soon(rank.hear, message)

    def carry(self, member: Member, message: Any) -> None:
        rank = self.ranks[member.rank]
        if rank.member == member and rank.alive and not rank.silent:
            self.loop.call_soon(self._heard, rank, message)

    def _heard(self, rank: FakeRank, message: Any) -> None:
        if rank.alive:
            self.controller.on_message(rank.member, message)

    # What can be seen

    @property
    def all_serve(self) -> bool:
        records = self.controller.machine.records.values()
        return all(record.state is RankState.SERVING for record in records)

    async def until(self, condition: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
        limit = self.loop.time() + seconds
        while not condition():
            assert self.loop.time() < limit, f"not within {seconds} s: {what}"
            await asyncio.sleep(0.01)

    def wrong(self) -> set[Place]:
        """Slots of the living that the placement names and whose bytes are another's."""
        placement = self.controller.repairs.placement
        return {
            (layer, physical)
            for layer, row in enumerate(placement.slots)
            for physical, logical in enumerate(row)
            if logical != EMPTY
            and (rank := self.ranks[placement.rank_of(physical)]).alive
            and rank.contents[layer, physical] != logical
        }
