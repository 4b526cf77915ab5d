"""The model of a group on several hosts: around the real hosts' machine and the real lease, beside the real rest.

Hosts are lost whole, links are cut in one direction or in both and come back, and time passes for all at once, a beat
at a time. What `membership_model.py` leaves out is left out here too, and:

* `Launched` is left out: the rank's first report says the same.
* On a link that holds, what is said is heard within its beat, but for some beats that are counted.
* All hosts reach each other but by a link that is cut, and say so when they are ready.
* Rows of the exchange that were sent before a cut have arrived, or arrive when it is over.
* What ends with a lease does so within the margin: no more time passes until it has.
* An incarnation whose host is lost, once the next one is launched, is at work until its host ends it and does nothing
  else: what it says is of an older one, and rows of its host are not taken any more.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

from elastic_ep.machines.contract import Tick
from elastic_ep.machines.hosts import events as ho
from elastic_ep.machines.hosts.lease import Lease as OwnLease
from elastic_ep.machines.hosts.machine import HERE, HostsMachine
from elastic_ep.machines.membership import events as ev
from elastic_ep.timing import Timing
from elastic_ep.wire.host_messages import (
    Died,
    Expelled,
    Fence,
    GetReady,
    HostAlive,
    HostLost,
    HostReady,
    HostUp,
    Join,
    LaunchWith,
    Lease,
    Left,
    Links,
    Reach,
    Reaped,
    Welcome,
)
from elastic_ep.wire.messages import Member, RankState, SnapshotRequest
from tests.machines.membership_model import (
    ALIVE,
    DEAD,
    DOOMED,
    GONE,
    NOTICED,
    UNSUBSCRIBED,
    Bounds,
    Model,
    World,
    keep,
    spent,
    with_item,
)
from tests.machines.model_rank import RankModel, Violation

CUTS, HOST_DEATHS, UNHEARD, LATE = range(4, 8)
OUT, ASKED, IN = range(3)
PHASE = ("dead", "wants to join", "in the group")
CUT = {
    (True, True): ((False, False), (False, True), (True, False)),
    (True, False): ((False, False),),
    (False, True): ((False, False),),
}
"""Which directions may still hold after one more cut: to the first host, and from it."""
Action = tuple[Any, Callable[[], World]]


class Beats(Timing):
    """In beats: lost after two, and surely over two after that."""

    silent_beats: ClassVar[int] = 1
    preparing_beats: ClassVar[int] = 1
    closed_beats: ClassVar[int] = 0
    lease_ms: ClassVar[int] = 3
    lease_margin_ms: ClassVar[int] = 1


class Far(NamedTuple):
    """One machine beside the first host. `up` and `down`: whether its link to that one holds."""

    life: int = 1
    phase: int = OUT
    up: bool = True
    down: bool = True
    lease: int = -1
    orders: tuple[int, ...] = ()
    """On their way to it, and from it."""
    sent: tuple[int, ...] = ()


class HostsModel(Model):
    """`hosts[rank]`, by number; the group begins with `at_start` of them."""

    def __init__(self, bounds: Bounds, hosts: tuple[int, ...], at_start: int) -> None:
        super().__init__(bounds)
        self.hosts = hosts
        self.at_start = at_start
        self.machines: list[HostsMachine] = []
        self.leases: list[OwnLease] = []
        self._machine_ids: dict[Any, int] = {}
        self._lease_ids: dict[Any, int] = {}
        self._hosts_steps: dict[tuple[int, Any], tuple[int, tuple[Any, ...]]] = {}

    def first(self, machines: int) -> tuple[int, tuple[Far, ...]]:
        needs = GetReady(self.hosts, "", "", (), (0,) * 6, b"", "", 0, 0, 0)
        config = ho.HostsConfig(self.hosts, self.at_start, "first", "1", needs, "", Reach(HERE, "first", 0))
        machine = HostsMachine(config, Beats)
        machine.step(ho.OwnLinks(self.links()))
        return self.keep_machine(machine), (Far(),) * machines

    def links(self) -> Links:
        return Links(tuple(sorted(set(self.hosts))))

    def keep_machine(self, machine: HostsMachine) -> int:
        """Times are kept as counted from now."""
        for place in machine.places.values():
            place.answered_ms = max(place.answered_ms - machine.now_ms, -9) if place.token else 0
        for token, ending in machine.endings.items():
            machine.endings[token] = replace(ending, until_ms=ending.until_ms - machine.now_ms)
        machine.now_ms = 0
        return keep(machine, machine.state(), self._machine_ids, self.machines)

    def keep_lease(self, lease: OwnLease) -> int:
        if not lease.sent:
            lease.number = 0
        key = (lease.until, lease.number, tuple(lease.sent.items()))
        return keep(lease, key, self._lease_ids, self.leases)

    def lease(self, far: Far, now: int = 0) -> OwnLease:
        """A copy, as it is so much later."""
        kept = self.leases[far.lease]
        sent = {number: at - now for number, at in kept.sent.items()}
        return replace(kept, until=kept.until - now, sent=sent)

    # What may happen

    def successors(self, world: World) -> Iterator[Action]:
        for label, act in super().successors(world):
            if self._link_allows(world, *label):
                yield label, act
        for at, far in enumerate(world.far):
            yield from self._far_actions(world, at, far)
        if self._time_matters(world):
            if not any((far.up and far.sent) or (far.down and far.orders) for far in world.far):
                yield ("time passes", -1), lambda: self._beat_passes(world)
            elif world.budget[LATE]:
                yield ("what is said is late", -1), lambda: self._beat_passes(spent(world, LATE))

    def _link_allows(self, world: World, what: str, rank: int) -> bool:
        if what in ("work", "timeout") or world.born[rank][0] < 0:
            return True
        at, life = world.born[rank]
        far: Far = world.far[at]
        if what in ("death noticed", "gone"):
            return far.phase == IN and far.life == life and far.up
        if what == "heard from":
            return far.up
        return far.down or what in ("boundary", "dies")

    def _far_actions(self, world: World, at: int, far: Far) -> Iterator[Action]:
        cuts, host_deaths, lost, _ = world.budget[CUTS:]
        if far.orders and far.down:
            yield ("told", at), lambda: self._obey(world, at)
        if far.sent and far.up:
            yield ("host heard", at), lambda: self._heard_of(world, at)
        if far.sent and lost and isinstance(self.messages[far.sent[0]].message, HostAlive):
            yield ("sign of life lost", at), lambda: spent(self._far(world, at, sent=far.sent[1:]), UNHEARD)
        if far.phase == IN and self.leases[far.lease].ended(0):
            yield ("lease ends", at), lambda: self._new_life(world, at)
        if far.phase == OUT and self.bounds.relaunch:
            yield ("host comes", at), lambda: self._new_life(world, at)
        elif host_deaths:
            yield ("host dies", at), lambda: spent(self._host_dies(world, at), HOST_DEATHS)
        if cuts and far.phase != OUT:
            for up, down in CUT.get((far.up, far.down), ()):
                label = ("link cut" if up == down else "half cut", at)
                yield label, lambda up=up, down=down: self._cut(world, at, up, down)  # type: ignore[misc]  # bound now
        if not far.up:
            yield ("link mends up", at), lambda: self._mend(world, at, up=True)
        if not far.down:
            yield ("link mends down", at), lambda: self._mend(world, at, down=True)

    def _far(self, world: World, at: int, **changes: Any) -> World:
        return world._replace(far=with_item(world.far, at, world.far[at]._replace(**changes)))

    # Time

    def _time_matters(self, world: World) -> bool:
        """A group that is well goes on as it does; and who must end first does."""
        if any(far.phase == IN and self.leases[far.lease].ended(0) for far in world.far):
            return False
        seated = self._seated(world)
        return bool(self.machines[world.hosts].endings) or any(
            not (far.up and far.down) or (far.phase != IN and token(at, far.life) in seated)
            or token(at, far.life - 1) in seated
            for at, far in enumerate(world.far)
        )  # fmt: skip

    def _seated(self, world: World) -> set[str]:
        return {place.token for place in self.machines[world.hosts].places.values()}

    def _beat_passes(self, world: World) -> World:
        world = self._tell_hosts(world, Tick(1))
        for at, far in enumerate(world.far):
            if far.phase == IN:
                world = self._far(world, at, lease=self.keep_lease(self.lease(far, 1)))
        for at, far in enumerate(world.far):
            if far.phase == IN:
                world = self._speak(world, at)
                if far.up and len(world.far[at].sent) == 1:
                    world = self._heard_of(world, at)
                    if far.down and len(world.far[at].orders) == 1:
                        world = self._obey(world, at)
        return self._tell_hosts(world, ho.Beat())._replace(free_ticks=0)

    # A host

    def _speak(self, world: World, at: int) -> World:
        lease = self.lease(world.far[at])
        number = lease.speak(0)
        return self._say(self._far(world, at, lease=self.keep_lease(lease)), at, HostAlive(number))

    def _say(self, world: World, at: int, message: Any) -> World:
        far = world.far[at]
        kept = self.keep_message(ho.Heard(token(at, far.life), message))
        return self._far(world, at, sent=(*far.sent, kept))

    def _heard_of(self, world: World, at: int) -> World:
        first, *rest = world.far[at].sent
        heard = self.messages[first]
        world = self._tell_hosts(self._far(world, at, sent=tuple(rest)), heard)
        if isinstance(heard.message, HostReady):
            world = self._tell_hosts(world, ho.Heard(heard.token, self.links()))
        return world

    def _obey(self, world: World, at: int) -> World:
        first, *rest = world.far[at].orders
        world = self._far(world, at, orders=tuple(rest))
        match self.messages[first]:
            case Welcome():
                lease = OwnLease.begun(Beats.lease_ms, 0)
                world = self._far(world, at, phase=IN, lease=self.keep_lease(lease))
                world = self._say(self._speak(world, at), at, HostReady(0))
            case Lease(number):
                lease = self.lease(world.far[at])
                lease.answered(number)
                world = self._far(world, at, lease=self.keep_lease(lease))
            case LaunchWith(member):
                world = self._launch_there(world, at, member)
            case Fence(member):
                world = self._fence_there(world, member)
            case Expelled():
                world = self._new_life(world, at)
        return world

    def _launch_there(self, world: World, at: int, member: Member) -> World:
        rank = member.rank
        older = self.ranks[world.ranks[rank]].machine.me
        if member < older:  # its host does not know yet that it is lost
            return world._replace(unended=(*world.unended, (member, at, world.far[at].life)))
        if world.life[rank] in (ALIVE, DOOMED):
            if world.born[rank][0] < 0 or token(*world.born[rank]) in self._seated(world):
                raise Violation(f"{older} runs where it may, and {member} is launched")
            world = world._replace(unended=(*world.unended, (older, *world.born[rank])))
        states = (RankState.INIT_CUDA, RankState.INIT_DIST)
        first = (*(ev.Reported(member, state) for state in states), SnapshotRequest())
        world = world._replace(
            ranks=with_item(world.ranks, rank, self.keep_rank(RankModel(member))),
            life=with_item(world.life, rank, ALIVE),
            up=with_item(world.up, rank, tuple(self.keep_message(each) for each in first)),
            down=with_item(world.down, rank, ()),
            born=with_item(world.born, rank, (at, world.far[at].life)),
        )
        return self._with_cursor(world, rank, UNSUBSCRIBED)

    def _fence_there(self, world: World, member: Member) -> World:
        if self.ranks[world.ranks[member.rank]].machine.me == member and world.life[member.rank] == ALIVE:
            world = world._replace(life=with_item(world.life, member.rank, DOOMED))
        return world

    def _ranks_end(self, world: World, at: int) -> World:
        for rank, born in enumerate(world.born):
            if born == (at, world.far[at].life) and world.life[rank] in (ALIVE, DOOMED):
                world = self._die_unasked(world, rank)
        left = tuple(each for each in world.unended if each[1:] != (at, world.far[at].life))
        return world._replace(unended=left)

    def _die_unasked(self, world: World, rank: int) -> World:
        world = world._replace(life=with_item(world.life, rank, DEAD), down=with_item(world.down, rank, ()))
        return self._with_cursor(world, rank, UNSUBSCRIBED)

    def _host_dies(self, world: World, at: int) -> World:
        return self._far(self._ranks_end(world, at), at, phase=OUT, orders=(), sent=(), lease=-1)

    def _new_life(self, world: World, at: int) -> World:
        """It ends its ranks, says so if it can be heard, and joins anew."""
        if world.far[at].phase == IN:
            world = self._ranks_end(world, at)
            world = self._say(world, at, Left()) if world.far[at].up else self._far(world, at, sent=())
        life = world.far[at].life + 1
        world = self._far(world, at, phase=ASKED, life=life, orders=(), lease=-1)
        return self._say(world, at, Join(f"host {at}", "1", ()))

    def _cut(self, world: World, at: int, up: bool, down: bool) -> World:
        begun = [self.ranks[key].begun for key in world.ranks]
        arrived = tuple(steps[-1].step if steps else -1 for steps in begun)
        return spent(self._far(world, at, up=up, down=down)._replace(arrived=arrived), CUTS)

    def _mend(self, world: World, at: int, up: bool = False, down: bool = False) -> World:
        far = world.far[at]
        world = self._far(world, at, up=far.up or up, down=far.down or down)
        if all(each.up and each.down for each in world.far):
            world = world._replace(arrived=())
        return world

    # The first host

    def _tell_hosts(self, world: World, event: Any) -> World:
        key = (world.hosts, event)
        if key not in self._hosts_steps:
            machine = copy_hosts(self.machines[world.hosts])
            effects = tuple(machine.step(event))
            try:
                machine.check()
            except AssertionError as error:
                raise Violation(f"hosts: {error}") from error
            self._hosts_steps[key] = (self.keep_machine(machine), effects)
        hosts, effects = self._hosts_steps[key]
        world = world._replace(hosts=hosts)
        for effect in effects:
            world = self._hosts_effect(world, effect)
        return world

    def _hosts_effect(self, world: World, effect: ho.Effect) -> World:
        match effect:
            case ho.Say(to, Welcome() | Lease() | LaunchWith() | Fence() | Expelled() as message):
                for at, far in enumerate(world.far):
                    kept = self.keep_message(message)
                    again = isinstance(message, Expelled) and kept in far.orders
                    if token(at, far.life) == to and far.phase != OUT and not again:
                        world = self._far(world, at, orders=(*far.orders, kept))
            case ho.Here(LaunchWith(member)):
                world = super().launch(world, member)
            case ho.Here(Fence(member)):
                world = self._fence_there(world, member)
            case ho.Tell(HostUp(host)):
                there = tuple(rank for rank, at in enumerate(self.hosts) if at == host)
                world = self._tell_controller(world, ev.Grown(there))
                world = self._tell_controller(world, ev.RelaunchRequested(self._dead(world, host)))
            case ho.Tell(Died(member)):
                world = self._tell_controller(world, ev.DeathNoticed(member, "killed"))
            case ho.Tell(HostLost(_, members)):
                world = self._tell_controller(world, ev.HostLost(members, "its host"))
            case ho.Tell(Reaped(member, status)):
                world = self._reaped(world, member, status)
        return world

    def _dead(self, world: World, host: int) -> tuple[int, ...]:
        records = self.controllers[world.controller].records.values()
        there = [record for record in records if self.hosts[record.member.rank] == host]
        return tuple(
            record.member.rank for record in there if record.fenced or record.state is RankState.FAILED
        )

    def _reaped(self, world: World, member: Member, status: str) -> World:
        rank = member.rank
        runs = world.life[rank] in (ALIVE, DOOMED) and self.ranks[world.ranks[rank]].machine.me == member
        if runs or any(older == member for older, *_ in world.unended):
            raise Violation(f"two incarnations at work: {member} runs, and counts as gone")
        if self.ranks[world.ranks[rank]].machine.me == member and world.life[rank] in (DEAD, NOTICED):
            world = world._replace(life=with_item(world.life, rank, GONE), up=with_item(world.up, rank, ()))
        return self._tell_controller(world, ev.ProcessGone(member, status))

    def launch(self, world: World, member: Member) -> World:
        return self._tell_hosts(world, ho.Ordered(LaunchWith(member, "")))

    def fence(self, world: World, member: Member) -> World:
        return self._tell_hosts(world, ho.Ordered(Fence(member)))

    # Ranks

    def _tell_controller(self, world: World, event: Any) -> World:
        world = super()._tell_controller(world, event)
        for older, *_ in world.unended:
            seat = self.controllers[world.controller].view.seat(older.rank)
            if seat is not None and seat.member != older:
                raise Violation(f"two incarnations at work: {older} runs, and {seat.member} is admitted")
        return world

    def _notice(self, world: World, rank: int) -> World:
        if world.born[rank][0] < 0:
            return super()._notice(world, rank)
        member = self.ranks[world.ranks[rank]].machine.me
        at, life = world.born[rank]
        world = world._replace(life=with_item(world.life, rank, NOTICED), up=with_item(world.up, rank, ()))
        return self._tell_hosts(world, ho.Heard(token(at, life), Died(member, "mutex", 0)))

    def _gone(self, world: World, rank: int) -> World:
        if world.born[rank][0] < 0:
            return super()._gone(world, rank)
        member = self.ranks[world.ranks[rank]].machine.me
        at, life = world.born[rank]
        world = world._replace(life=with_item(world.life, rank, GONE))
        return self._tell_hosts(world, ho.Heard(token(at, life), Reaped(member, "signal 9", 0)))

    def expelled(self, world: World, rank: int) -> World:
        """It hears of its host's loss, ahead of its host perhaps."""
        at, life = world.born[rank]
        if at < 0 or token(at, life) in self._seated(world):
            return super().expelled(world, rank)
        return self._die_unasked(world, rank)

    def _has_sent(self, world: World, peer: Member, to: RankModel) -> bool:
        if not super()._has_sent(world, peer, to):
            return False
        there, here = world.born[peer.rank][0], world.born[to.machine.me.rank][0]
        holds = there == here or ((there < 0 or world.far[there].up) and (here < 0 or world.far[here].down))
        return holds or to.step <= world.arrived[peer.rank]

    # The end of a path

    def _unfinished(self, world: World) -> str:
        machine = self.controllers[world.controller]
        if wrong := super()._unfinished(world):
            return wrong
        if self.bounds.relaunch and len(machine.view.seats) < len(world.ranks):
            return f"only {sorted(machine.view.members)} are seated"
        return ""

    def describe(self, world: World) -> str:
        places = "\n".join(f"  {place}" for place in self.machines[world.hosts].places.values())
        far = "\n".join(
            f"  host {at} {PHASE[far.phase]}, life {far.life}, up {far.up}, down {far.down}, "
            f"{self.leases[far.lease] if far.lease >= 0 else 'no lease'}, "
            f"told {[self.messages[each] for each in far.orders]}"
            for at, far in enumerate(world.far)
        )
        return f"{super().describe(world)}\n{places}\n{far}"


def token(at: int, life: int) -> str:
    return f"{at}-{life}"


def copy_hosts(machine: HostsMachine) -> HostsMachine:
    new = HostsMachine(machine.config, machine.timing)
    new.places = {number: copy.copy(place) for number, place in machine.places.items()}
    for place in new.places.values():
        place.members, place.held = set(place.members), dict(place.held)
    new.waiting, new.endings = dict(machine.waiting), dict(machine.endings)
    new.links = replace(machine.links, said=dict(machine.links.said), apart=dict(machine.links.apart))
    new.now_ms, new.over = machine.now_ms, machine.over
    return new
