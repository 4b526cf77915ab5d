"""The hosts of a group: this one, and those that have joined, by what they say (`wire/host_messages.py`).

Each rank belongs to a host by number. A host that joins takes a number that nobody has; when it is taken for dead, its
ranks are lost in one event, other hosts are told to take nothing of it any more (`GiveUp`), and its number is given to
the next, which may be the same host. That has ranks launched, which get ready; they are not admitted before those of
the lost host count as gone: when its lease has surely run out there, or it says that it has ended them. Who comes takes
the place of a host that is missing; when none is, the group grows by it, up to its capacity; and when that is full, it
waits, as a spare.

All hosts must reach each other (`links.py`): a host has ranks launched when it has reached all that have some, and one
of two that are apart is lost, though both are heard here.

HAZARD: nobody but its own agent can kill a process of another host, and that one may be cut off. That its ranks are dead
is known by the lease alone. `Tick` comes before whatever is heard: what was answered earlier than the machine knows
would end earlier, too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from elastic_ep.machines.contract import Tick
from elastic_ep.machines.hosts import events as ho
from elastic_ep.machines.hosts.events import Effect, Event, HostsConfig
from elastic_ep.machines.hosts.links import LinkTable
from elastic_ep.machines.machine import Machine
from elastic_ep.machines.membership.relaunch import HOST_LOST
from elastic_ep.timing import Timing
from elastic_ep.wire.host_messages import (
    Died,
    Expelled,
    Fence,
    GiveUp,
    HostAlive,
    HostLost,
    HostReady,
    HostUp,
    Join,
    Launched,
    LaunchFailed,
    LaunchWith,
    Lease,
    Leave,
    Left,
    Links,
    Reach,
    Reaped,
    Refuse,
    ToHost,
    Wait,
    Welcome,
)
from elastic_ep.wire.messages import Member

HERE = 0
"""The number of the run process's own host."""


@dataclass(slots=True)
class Place:
    """A number, and the host that has it, if one has."""

    number: int
    missed: bool = True
    """The group wants a host there: it began with one, or has grown by it."""
    token: str = ""
    """Of the host's present life; "": nobody has the number."""
    incarnation: int = 0
    address: str = ""
    carrier: Reach | None = None
    ready: bool = False
    """It takes orders."""
    linked: bool = False
    """It has reached all others that were linked: ranks may run there."""
    unlinked: int = 0
    """So many beats it has waited for that."""
    silent: int = 0
    answered_ms: int = 0
    """When it was last told that it may live on."""
    members: set[Member] = field(default_factory=set)
    """That it was told to launch, and that may run there."""
    held: dict[Member, str] = field(default_factory=dict)
    """To be launched when there is a host."""


@dataclass(frozen=True, slots=True)
class Ending:
    """What a lost host may have that does not know it yet: these, until then."""

    members: tuple[Member, ...]
    until_ms: int


@dataclass(eq=False)
class HostsMachine(Machine[Event, Effect]):
    """Of `timing` it takes `silent_beats`, `preparing_beats`, `closed_beats`, `lease_ms` and `lease_margin_ms`."""

    transient = Machine.transient | {"timing"}
    config: HostsConfig
    timing: type[Timing] = Timing

    def __post_init__(self) -> None:
        self.places = {
            number: Place(number, missed=number < self.config.at_start)
            for number in sorted(set(self.config.hosts) - {HERE})
        }
        self.links = LinkTable(HERE)
        self.waiting: dict[str, Join] = {}
        """Who wants to join, in the order of asking."""
        self.endings: dict[str, Ending] = {}
        """By the life that is lost."""
        self.now_ms = 0
        self.over = False
        self._effects: list[Effect] = []
        self._handlers: dict[type, Callable[[Any], None]] = {
            Tick: self._on_tick,
            ho.Heard: self._on_heard,
            ho.Closed: self._on_closed,
            ho.NotUnderstood: self._on_not_understood,
            ho.Beat: self._on_beat,
            ho.Ordered: self._on_ordered,
            ho.OwnLinks: self._on_own_links,
            ho.GroupOver: self._on_group_over,
        }

    def _step(self, event: Event) -> list[Effect]:
        self._effects = []
        self._handlers[type(event)](event)
        return self._effects

    def _check(self) -> None:
        tokens = self._tokens()
        assert len(set(tokens)) == len(tokens), "one life has two numbers"
        for place in self.places.values():
            assert place.token or not (place.members or place.ready), f"nobody has {place.number}"
            assert place.token not in self.endings, f"{place.number} has a life that is lost"

    def _on_tick(self, event: Tick) -> None:
        self.now_ms = max(self.now_ms, event.now_ms)
        for token, ending in list(self.endings.items()):
            if self.now_ms >= ending.until_ms:
                self._end(token)

    def _on_group_over(self, _event: ho.GroupOver) -> None:
        self.over = True
        self.endings.clear()
        for token in (*self._tokens(), *self.waiting):
            self._say(token, Leave())
        self.waiting.clear()

    # What the controller wants

    def _on_ordered(self, event: ho.Ordered) -> None:
        order = event.order
        place = self.places.get(self.config.hosts[order.member.rank])
        if place is None:
            self._effects.append(ho.Here(order))
        elif isinstance(order, LaunchWith):
            self._launch(place, order)
        elif isinstance(order, Fence) and place.held.pop(order.member, None) is not None:
            self._tell_gone((order.member,))
        elif place.token and order.member in place.members:
            self._say(place.token, order)

    def _launch(self, place: Place, order: LaunchWith) -> None:
        if place.linked:
            place.members.add(order.member)
            self._say(place.token, order)
        else:
            place.held[order.member] = order.config

    # What hosts say

    def _on_heard(self, event: ho.Heard) -> None:
        token, message = event.token, event.message
        if isinstance(message, Join):
            self._on_join(token, message)
            return
        place = next((place for place in self.places.values() if place.token == token), None)
        if place is None:
            if isinstance(message, Left):
                self._end(token)
            if not self.over and token not in self.waiting:
                self._say(token, Expelled())
            return
        match message:
            case HostAlive(number):
                place.silent = 0
                place.answered_ms = self.now_ms
                self._say(token, Lease(number))
            case HostReady(carrier_port):
                self._on_ready(place, carrier_port)
            case Links():
                self._on_links(place.number, message)
            case Left():
                self._lose(place, "it has left", over=True)
            case Launched() | Died() | Reaped() | LaunchFailed():
                self._on_rank(place, message)

    def _on_rank(self, place: Place, event: Launched | Died | Reaped | LaunchFailed) -> None:
        if event.member not in place.members:
            return
        if isinstance(event, Reaped | LaunchFailed):
            place.members.discard(event.member)
        self._effects.append(ho.Tell(event))

    def _on_not_understood(self, event: ho.NotUnderstood) -> None:
        self._say(event.token, Refuse(event.why))
        for place in self.places.values():
            if place.token == event.token:
                self._lose(place, f"it is not understood: {event.why}")

    def _on_closed(self, event: ho.Closed) -> None:
        self.waiting.pop(event.token, None)
        for place in self.places.values():
            if place.token == event.token:
                place.silent = max(place.silent, self._patience(place) - self.timing.closed_beats)

    # Who is there

    def _on_join(self, token: str, join: Join) -> None:
        if self.over:
            self._say(token, Leave())
        elif token in self._tokens() or token in self.waiting:
            pass  # it says so again and again
        elif why := self._unfit(join):
            self._say(token, Refuse(why))
        else:
            self._say(token, self.config.needs)
            if not self._seat(token, join):
                self.waiting[token] = join

    def _unfit(self, join: Join) -> str:
        """Why it will never do; "" if it may."""
        config = self.config
        if join.release != config.release:
            return f"it runs elastic_ep {join.release}, and the group {config.release}: install that"
        if join.address == config.address:
            return f"{join.address} is the address of the group's first host: give --address, its own"
        if config.machine and join.machine != config.machine:
            return "it is another machine, and ranks on GPUs are on one as yet: start the group with --device cpu"
        if config.fused and config.fused not in join.builds:
            return f"its processor cannot run the build {config.fused} of the engine in C++, and others differ in bits"
        return ""

    def _seat(self, token: str, join: Join) -> bool:
        if any(place.token and place.address == join.address for place in self.places.values()):
            self._say(token, Wait(f"a host at {join.address} is in the group: is it the one before this?"))
            return False
        missing = [place for place in self.places.values() if place.missed and not place.token]
        free = missing or [place for place in self.places.values() if not place.token]
        if not free:
            self._say(token, Wait("every number is taken"))
            return False
        place = min(free, key=lambda place: (place.address != join.address, place.number))
        place.token, place.address = token, join.address
        place.incarnation += 1
        place.silent, place.answered_ms = 0, self.now_ms
        self._say(token, Welcome(place.number, place.incarnation))
        return True

    def _seat_next(self) -> None:
        for token, join in list(self.waiting.items()):
            if self._seat(token, join):
                del self.waiting[token]

    def _on_ready(self, place: Place, carrier_port: int) -> None:
        if place.ready:
            return
        place.ready = True
        # HAZARD: its lease began when it had its welcome, however late that was, and its first sign of life may be lost.
        place.answered_ms = self.now_ms
        place.carrier = Reach(place.number, place.address, carrier_port)
        for other in self.places.values():
            if other is not place and other.incarnation > bool(other.token):
                self._say(place.token, GiveUp(other.number, other.incarnation - bool(other.token)))
        ready = [other.carrier for other in self.places.values() if other.ready and other.carrier]
        for where in (self.config.carrier, *ready):
            if where.host != place.number:
                self._say(place.token, where)
        self._tell_others(place, place.carrier)
        self._link_more()

    # Who reaches whom

    def _on_own_links(self, event: ho.OwnLinks) -> None:
        self._on_links(HERE, event.links)

    def _on_links(self, number: int, links: Links) -> None:
        self.links.say(number, links)
        self._link_more()

    def _link_more(self) -> None:
        """Hosts that are ready, and have reached all others, get their ranks."""
        for place in self.places.values():
            if place.ready and not place.linked and not self.links.apart_from(place.number, self._linked()):
                place.linked = place.missed = True
                held, place.held = place.held, {}
                for member, config in held.items():
                    self._launch(place, LaunchWith(member, config))
                self._effects.append(ho.Tell(HostUp(place.number, place.address, place.incarnation - 1)))

    def _linked(self) -> list[int]:
        return [HERE, *(place.number for place in self.places.values() if place.linked)]

    def _look_at_links(self) -> None:
        if (apart := self.links.look(self._linked())) is not None:
            number, other = apart
            self._lose(self.places[number], f"it and host {other} do not reach each other")
        for place in self.places.values():
            if place.ready and not place.linked:
                place.unlinked += 1
                if place.unlinked == self.timing.apart_beats:
                    others = self.links.apart_from(place.number, self._linked())
                    self._effects.append(ho.Apart(place.number, tuple(others)))

    def _on_beat(self, _event: ho.Beat) -> None:
        for place in self.places.values():
            if place.token:
                place.silent += 1
                if place.silent > self._patience(place):
                    self._lose(place, "it is not heard of any more")
        self._look_at_links()

    def _patience(self, place: Place) -> int:
        """Beats. One that is not ready has much to do, on a busy machine for long, and nothing that others wait for."""
        return self.timing.silent_beats if place.ready else self.timing.preparing_beats

    def _lose(self, place: Place, why: str, over: bool = False) -> None:
        """`over`: nothing runs there any more."""
        if not over:
            self._say(place.token, Expelled())
        token, members = place.token, tuple(sorted(place.members))
        self.endings[token] = Ending(
            members, place.answered_ms + self.timing.lease_ms + self.timing.lease_margin_ms
        )
        place.members.clear()
        place.token, place.ready, place.linked, place.unlinked = "", False, False, 0
        self.links.forget(place.number)
        self._effects.append(ho.Tell(HostLost(place.number, members, why)))
        self._tell_others(place, GiveUp(place.number, place.incarnation))
        if over or self.now_ms >= self.endings[token].until_ms:
            self._end(token)
        self._seat_next()

    def _end(self, token: str) -> None:
        if (ending := self.endings.pop(token, None)) is not None:
            self._tell_gone(ending.members)

    def _tell_gone(self, members: tuple[Member, ...]) -> None:
        self._effects += [ho.Tell(Reaped(member, HOST_LOST, 0)) for member in members]

    def _tell_others(self, place: Place, message: Reach | GiveUp) -> None:
        self._effects.append(ho.Here(message))
        for other in self.places.values():
            if other is not place and other.ready:
                self._say(other.token, message)

    def _say(self, token: str, message: ToHost) -> None:
        self._effects.append(ho.Say(token, message))

    def _tokens(self) -> list[str]:
        return [place.token for place in self.places.values() if place.token]
