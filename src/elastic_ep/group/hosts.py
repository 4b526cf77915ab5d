"""The hosts of a group, as the controller and the run process see them: shell of `machines/hosts/machine.py`."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace

import structlog

from elastic_ep.host.keeper import Keeper
from elastic_ep.machines.contract import Tick
from elastic_ep.machines.hosts import events as ho
from elastic_ep.machines.hosts.machine import HERE, HostsMachine
from elastic_ep.timing import Timing
from elastic_ep.wire.host_messages import (
    Died,
    Fence,
    FromHost,
    GiveUp,
    HostEvent,
    Join,
    LaunchWith,
    Links,
    Reach,
    Reaped,
    Refuse,
    Watch,
    Welcome,
)
from elastic_ep.wire.host_sockets import HostsWire
from elastic_ep.wire.messages import Member

OpenWire = Callable[
    [Callable[[bytes, FromHost], None], Callable[[bytes], None], Callable[[bytes, str], None]], HostsWire
]
TOKENS = "latin-1"
"""Any bytes, as text and back."""
log = structlog.get_logger()


class Hosts:
    """What `Keeper` is for one host: `launch`, `watch`, `kill`, `hear`."""

    def __init__(
        self,
        config: ho.HostsConfig,
        timing: Timing,
        keeper: Keeper,
        open_wire: OpenWire,
    ) -> None:
        self._hosts = config.hosts
        self._keeper = keeper
        self._beat_s = timing.host_beat_ms / 1000
        self._loop = asyncio.get_running_loop()
        self._machine = HostsMachine(config)
        self._effects: deque[ho.Effect] = deque()
        self._performing = False
        self._closing = False
        self._addresses: dict[str, str] = {}
        """Of who has asked to join, for the log."""
        self._on_event: Callable[[HostEvent], None] = lambda _event: None
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
        self._feed(ho.GroupOver())

    def on_links(self, links: Links) -> None:
        """Of this host."""
        self._feed(ho.OwnLinks(links))

    def close(self) -> None:
        self._wire.close()

    # As a keeper

    def launch(self, member: Member, config_json: str) -> None:
        self._feed(ho.Ordered(LaunchWith(member, config_json)))

    def watch(self, member: Member) -> None:
        self._feed(ho.Ordered(Watch(member)))

    def kill(self, member: Member) -> None:
        self._feed(ho.Ordered(Fence(member)))

    def hear(self) -> None:
        self._keeper.hear()
        self._wire.hear()

    def is_here(self, member: Member) -> bool:
        """Whether it runs on the run process's own host."""
        return self._hosts[member.rank] == HERE

    # What hosts say

    def _on_message(self, token: bytes, message: FromHost) -> None:
        if isinstance(message, Join):
            self._addresses[token.decode(TOKENS)] = message.address
        self._feed(ho.Heard(token.decode(TOKENS), message))

    def _on_bad(self, token: bytes, why: str) -> None:
        log.error("a host is not understood", why=why)
        self._feed(ho.NotUnderstood(token.decode(TOKENS), why))

    def _on_closed(self, token: bytes) -> None:
        self._addresses.pop(token.decode(TOKENS), None)
        self._feed(ho.Closed(token.decode(TOKENS)))

    def _beat(self) -> None:
        """Look who has been heard of since the last look."""
        if self._closing:
            return
        self._loop.call_later(self._beat_s, self._beat)
        self._wire.hear()
        self._feed(ho.Beat())

    # The machine

    def _feed(self, event: ho.Event) -> None:
        """HAZARD: who is told of something may want something at once: what that leads to comes after all the rest. And
        who wants something is never told of anything before it has gone on."""
        self._effects += self._machine.step(Tick(int(self._loop.time() * 1000)))
        self._effects += self._machine.step(event)
        if self._performing:
            return
        self._performing = True
        tell = self._tell_soon if isinstance(event, ho.Ordered) else self._on_event
        try:
            while self._effects:
                self._perform(self._effects.popleft(), tell)
        finally:
            self._performing = False

    def _tell_soon(self, event: HostEvent) -> None:
        self._loop.call_soon(self._on_event, event)

    def _perform(self, effect: ho.Effect, tell: Callable[[HostEvent], None]) -> None:
        match effect:
            case ho.Say(token, message):
                if isinstance(message, Refuse):
                    log.error("a host is refused", address=self._addresses.get(token, ""), why=message.why)
                elif isinstance(message, Welcome):
                    log.info("a host joins", host=message.host, address=self._addresses.get(token, ""))
                self._wire.send(token.encode(TOKENS), message)
            case ho.Here(LaunchWith(member, config)):
                self._keeper.launch(member, config)
            case ho.Here(Watch(member)):
                self._keeper.watch(member)
            case ho.Here(Fence(member)):
                self._keeper.kill(member)
            case ho.Here(Reach() as where):
                self._keeper.reach(where)
            case ho.Here(GiveUp() as whom):
                self._keeper.give_up(whom)
            case ho.Apart(host, others):
                log.warning("a host does not reach others: its ranks wait", host=host, others=list(others))
            case ho.Tell(event):
                if isinstance(event, Died | Reaped):
                    event = replace(event, at_ns=time.monotonic_ns())  # theirs is of another clock
                tell(event)
