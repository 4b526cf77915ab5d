"""The hosts of a group: this one, by its keeper, and those that have joined, by what they say (`wire/host_messages.py`).

Each rank belongs to a host by number. A host that joins takes a number that nobody has; when it is taken for dead, its
ranks are lost in one event, other hosts are told to take nothing of it any more (`GiveUp`), and when its lease has
surely run out there its ranks count as gone: only then is the number given to the next, which may be the same host. Who
finds no free number waits, as a spare.

All hosts must reach each other (`links.py`): a host has ranks launched when it has reached all that have some, and one
of two that are apart is lost, though both are heard here.

HAZARD: nobody but its own agent can kill a process of another host, and that one may be cut off. That its ranks are dead
is known by the lease alone.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import partial

import structlog

from elastic_ep.group.links import LinkTable
from elastic_ep.host.keeper import Keeper
from elastic_ep.machines.membership.relaunch import HOST_LOST
from elastic_ep.timing import Timing
from elastic_ep.wire.host_messages import (
    Died,
    Expelled,
    Fence,
    FromHost,
    GiveUp,
    HostAlive,
    HostEvent,
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
    Wait,
    Watch,
    Welcome,
)
from elastic_ep.wire.host_sockets import HostsWire
from elastic_ep.wire.messages import Member

OpenWire = Callable[
    [Callable[[bytes, FromHost], None], Callable[[bytes], None], Callable[[bytes, str], None]], HostsWire
]
HERE = 0
"""The number of the run process's own host."""
log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class HostsConfig:
    """`hosts[rank]`. `welcome` is what a host is told that joins, but for its number. `address` is this host's."""

    hosts: tuple[int, ...]
    address: str
    release: str
    welcome: Welcome
    fused: str
    """The build of the engine in C++ that all ranks compute with; "": none."""
    carrier: Reach
    """Of this host."""
    timing: Timing


@dataclass(slots=True)
class _Place:
    """A number, and the host that has it, if one has."""

    number: int
    token: bytes = b""
    """Of the host's present life; b"": nobody has the number."""
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
    answered: float = 0.0
    """When it was last told that it may live on, on the loop's clock."""
    members: set[Member] = field(default_factory=set)
    """That it was told to launch, and that may run there."""
    held: dict[Member, str] = field(default_factory=dict)
    """To be launched when there is a host."""
    ending: asyncio.TimerHandle | None = None
    """Its host is lost, and may not know yet."""

    @property
    def free(self) -> bool:
        return not self.token and self.ending is None


class Hosts:
    """What `Keeper` is for one host: `launch`, `watch`, `kill`, `hear`."""

    def __init__(
        self,
        config: HostsConfig,
        keeper: Keeper,
        open_wire: OpenWire,
    ) -> None:
        self._config = config
        self._keeper = keeper
        self._timing = config.timing
        self._loop = asyncio.get_running_loop()
        self._places = {number: _Place(number) for number in sorted(set(config.hosts) - {HERE})}
        self._links = LinkTable(HERE, config.timing)
        self._waiting: dict[bytes, Join] = {}
        """Who wants to join, in the order of asking."""
        self._on_event: Callable[[HostEvent], None] = lambda _event: None
        self._closing = False
        self._wire = open_wire(self._on_message, self._on_closed, self._on_bad)

    @property
    def port(self) -> int:
        return self._wire.port

    def start(self, on_event: Callable[[HostEvent], None]) -> None:
        """`on_event` is called on the event loop and must not raise."""
        self._on_event = on_event
        self._beat()

    def leave(self) -> None:
        """The group is over: all hosts are told so."""
        self._closing = True
        for place in self._places.values():
            if place.ending is not None:
                place.ending.cancel()
        for token in (*self._tokens(), *self._waiting):
            self._wire.send(token, Leave())

    def close(self) -> None:
        self._wire.close()

    # As a keeper

    def launch(self, member: Member, config_json: str) -> None:
        place = self._places.get(self._config.hosts[member.rank])
        if place is None:
            self._keeper.launch(member, config_json)
        elif place.linked:
            place.members.add(member)
            self._wire.send(place.token, LaunchWith(member, config_json))
        else:
            place.held[member] = config_json

    def watch(self, member: Member) -> None:
        self._order(member, Watch(member), self._keeper.watch)

    def kill(self, member: Member) -> None:
        place = self._places.get(self._config.hosts[member.rank])
        if place is not None and place.held.pop(member, None) is not None:
            self._loop.call_soon(self._on_event, Reaped(member, HOST_LOST, time.monotonic_ns()))
            return
        self._order(member, Fence(member), self._keeper.kill)

    def hear(self) -> None:
        self._keeper.hear()
        self._wire.hear()

    def is_here(self, member: Member) -> bool:
        """Whether it runs on the run process's own host."""
        return self._config.hosts[member.rank] == HERE

    def _order(self, member: Member, order: Watch | Fence, here: Callable[[Member], None]) -> None:
        place = self._places.get(self._config.hosts[member.rank])
        if place is None:
            here(member)
        elif place.token and member in place.members:
            self._wire.send(place.token, order)

    # What hosts say

    def _on_message(self, token: bytes, message: FromHost) -> None:
        if isinstance(message, Join):
            self._on_join(token, message)
            return
        place = next((place for place in self._places.values() if place.token == token), None)
        if place is None:
            if not self._closing and token not in self._waiting:
                self._wire.send(token, Expelled())
            return
        match message:
            case HostAlive(number):
                place.silent = 0
                place.answered = self._loop.time()
                self._wire.send(token, Lease(number))
            case HostReady(carrier_port):
                self._on_ready(place, carrier_port)
            case Links():
                self._heard_links(place.number, message)
            case Left():
                self._lose(place, "it has left", over=True)
            case Launched() | Died() | Reaped() | LaunchFailed():
                self._on_rank(place, message)

    def _on_rank(self, place: _Place, event: Launched | Died | Reaped | LaunchFailed) -> None:
        if event.member not in place.members:
            return
        if isinstance(event, Reaped | LaunchFailed):
            place.members.discard(event.member)
        if isinstance(event, Died | Reaped):
            event = replace(event, at_ns=time.monotonic_ns())  # theirs is of another clock
        self._on_event(event)

    def _on_bad(self, token: bytes, why: str) -> None:
        log.error("a host is not understood", why=why)
        self._wire.send(token, Refuse(why))
        for place in self._places.values():
            if place.token == token:
                self._lose(place, f"it is not understood: {why}")

    def _on_closed(self, token: bytes) -> None:
        self._waiting.pop(token, None)
        for place in self._places.values():
            if place.token == token:
                place.silent = max(place.silent, self._timing.silent_beats - self._timing.closed_beats)

    # Who is there

    def _on_join(self, token: bytes, join: Join) -> None:
        if self._closing:
            self._wire.send(token, Leave())
        elif token in self._tokens() or token in self._waiting:
            pass  # it says so again and again
        elif why := self._unfit(join):
            log.error("a host is refused", address=join.address, why=why)
            self._wire.send(token, Refuse(why))
        elif not self._seat(token, join):
            self._waiting[token] = join

    def _unfit(self, join: Join) -> str:
        """Why it will never do; "" if it may."""
        config = self._config
        if join.release != config.release:
            return f"it runs elastic_ep {join.release}, and the group {config.release}: install that"
        if join.address == config.address:
            return f"{join.address} is the address of the group's first host: give --address, its own"
        if config.fused and config.fused not in join.builds:
            return f"its processor cannot run the build {config.fused} of the engine in C++, and others differ in bits"
        return ""

    def _seat(self, token: bytes, join: Join) -> bool:
        if any(place.token and place.address == join.address for place in self._places.values()):
            self._wire.send(
                token, Wait(f"a host at {join.address} is in the group: is it the one before this?")
            )
            return False
        free = [place for place in self._places.values() if place.free]
        if not free:
            self._wire.send(
                token, Wait("every number is taken, or will be free when a lost host's lease ends")
            )
            return False
        place = min(free, key=lambda place: (place.address != join.address, place.number))
        place.token, place.address = token, join.address
        place.incarnation += 1
        place.silent, place.answered = 0, self._loop.time()
        log.info("a host joins", host=place.number, address=join.address)
        welcome = replace(self._config.welcome, host=place.number, incarnation=place.incarnation)
        self._wire.send(token, welcome)
        return True

    def _seat_next(self) -> None:
        for token, join in list(self._waiting.items()):
            if self._seat(token, join):
                del self._waiting[token]

    def _on_ready(self, place: _Place, carrier_port: int) -> None:
        if place.ready:
            return
        place.ready = True
        place.carrier = Reach(place.number, place.address, carrier_port)
        for other in self._places.values():
            if other is not place and other.incarnation > bool(other.token):
                self._wire.send(place.token, GiveUp(other.number, other.incarnation - bool(other.token)))
        for where in self._carriers():
            if where.host != place.number:
                self._wire.send(place.token, where)
        self._tell_others(place, place.carrier)
        self._link_more()

    def _carriers(self) -> Collection[Reach]:
        ready = [place.carrier for place in self._places.values() if place.ready and place.carrier]
        return [self._config.carrier, *ready]

    # Who reaches whom

    def on_links(self, links: Links) -> None:
        """Of this host."""
        self._heard_links(HERE, links)

    def _heard_links(self, number: int, links: Links) -> None:
        self._links.say(number, links)
        self._link_more()

    def _link_more(self) -> None:
        """Hosts that are ready, and have reached all others, get their ranks."""
        for place in self._places.values():
            if place.ready and not place.linked and not self._links.apart_from(place.number, self._linked()):
                place.linked = True
                held, place.held = place.held, {}
                for member, config_json in held.items():
                    self.launch(member, config_json)
                self._on_event(HostUp(place.number, place.address, place.incarnation - 1))

    def _linked(self) -> list[int]:
        return [HERE, *(place.number for place in self._places.values() if place.linked)]

    def _look_at_links(self) -> None:
        if (apart := self._links.look(self._linked())) is not None:
            number, other = apart
            self._lose(self._places[number], f"it and host {other} do not reach each other")
        for place in self._places.values():
            if place.ready and not place.linked:
                place.unlinked += 1
                if place.unlinked == self._timing.apart_beats:
                    others = self._links.apart_from(place.number, self._linked())
                    log.warning(
                        "a host does not reach others: its ranks wait", host=place.number, others=others
                    )

    def _beat(self) -> None:
        """Look who has been heard of since the last look."""
        if self._closing:
            return
        self._loop.call_later(self._timing.host_beat_ms / 1000, self._beat)
        self._wire.hear()
        for place in self._places.values():
            if place.token:
                place.silent += 1
                if place.silent > self._timing.silent_beats:
                    self._lose(place, "it is not heard of any more")
        self._look_at_links()

    def _lose(self, place: _Place, why: str, over: bool = False) -> None:
        """`over`: nothing runs there any more."""
        members = tuple(sorted(place.members))
        place.members.clear()
        if not over:
            self._wire.send(place.token, Expelled())
        place.token, place.ready, place.linked, place.unlinked = b"", False, False, 0
        self._links.forget(place.number)
        self._on_event(HostLost(place.number, members, why))
        self._tell_others(place, GiveUp(place.number, place.incarnation))
        ends = place.answered + (self._timing.lease_ms + self._timing.lease_margin_ms) / 1000
        wait_s = 0.0 if over else max(0.0, ends - self._loop.time())
        place.ending = self._loop.call_later(wait_s, partial(self._over, place, members))

    def _over(self, place: _Place, members: tuple[Member, ...]) -> None:
        place.ending = None
        for member in members:
            self._on_event(Reaped(member, HOST_LOST, time.monotonic_ns()))
        self._seat_next()

    def _tell_others(self, place: _Place, message: Reach | GiveUp) -> None:
        if isinstance(message, Reach):
            self._keeper.reach(message)
        else:
            self._keeper.give_up(message)
        for other in self._places.values():
            if other is not place and other.ready:
                self._wire.send(other.token, message)

    def _tokens(self) -> list[bytes]:
        return [place.token for place in self._places.values() if place.token]
