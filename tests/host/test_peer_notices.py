"""A peer's death, told past the run process's event loop: what is heard, and what a rank does with it."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Collection
from pathlib import Path
from typing import Any

import anyio
import pytest

from elastic_ep.host.peer_notices import NoticeReader, NoticeSender
from elastic_ep.machines.rank.events import PeerDied, Started
from elastic_ep.rank.forward import ForwardThread
from elastic_ep.rank.mailbox import Mailbox
from elastic_ep.rank.outbox import Ready
from elastic_ep.wire.messages import Member, Seat, View
from tests.kit.harness import DEADLINE_S, running
from tests.kit.lone_rank import CONFIG, Wire, lone_rank

ME, PEER, OTHER = Member(0, 1), Member(1, 1), Member(2, 7)


class Heard:
    def __init__(self) -> None:
        self.deaths: list[Member] = []
        self._changed = anyio.Event()

    def __call__(self, member: Member) -> None:
        self.deaths.append(member)
        self._changed.set()
        self._changed = anyio.Event()

    async def expect(self, *deaths: Member) -> None:
        with anyio.fail_after(DEADLINE_S):
            while self.deaths != list(deaths):
                await self._changed.wait()


@pytest.mark.anyio
async def test_notices_reach_those_that_listen_and_nobody_else_matters(directory: Path) -> None:
    heard = Heard()
    reader, sender = NoticeReader(directory, ME, heard), NoticeSender(directory)
    sender.tell(PEER, [OTHER, ME])  # OTHER does not listen
    await heard.expect(PEER)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stranger:
        for noise in (b"", b"x", b"x" * 1000):
            stranger.sendto(noise, f"{directory}/notices-0.1")
    sender.tell(OTHER, [ME])
    await heard.expect(PEER, OTHER)
    reader.close()
    sender.tell(PEER, [ME])
    sender.close()
    sender.tell(PEER, [ME])  # by a watcher that has outlived the launcher


@pytest.mark.anyio
@pytest.mark.holds_the_loop("nothing may be read while datagrams are sent")
async def test_whoever_does_not_read_keeps_nobody_waiting(directory: Path) -> None:
    heard = Heard()
    reader, sender = NoticeReader(directory, ME, heard), NoticeSender(directory)
    for incarnation in range(5000):  # more than any queue of datagrams holds
        sender.tell(Member(1, incarnation), [ME])
    sender.tell(PEER, [ME])
    with anyio.fail_after(DEADLINE_S):
        while not heard.deaths:
            await anyio.lowlevel.checkpoint()
    assert len(heard.deaths) < 5000
    reader.close()
    sender.close()


@pytest.mark.anyio
async def test_the_launcher_tells_the_others_while_its_loop_is_busy(directory: Path) -> None:
    async with running(directory) as run:
        pid = (await run.up(PEER))["pid"]
        await run.up(OTHER)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        listener.bind(f"{directory}/notices-2.7")
        listener.settimeout(DEADLINE_S)
        os.kill(pid, signal.SIGKILL)
        notice = listener.recv(100)  # blocks the event loop: nothing else can have told it
        assert run.of(PEER) == ["Launched"]
        listener.close()
    assert notice == PEER.rank.to_bytes(8, "little") + PEER.incarnation.to_bytes(8, "little")


class Parts:
    """An exchange and a runner that remember what they were told."""

    def __init__(self) -> None:
        self.activated: list[Member] = []
        self.masked: list[Member] = []
        self.routed: list[set[int]] = []

    def activate(self, member: Member) -> None:
        self.activated.append(member)

    def mask(self, member: Member) -> None:
        self.masked.append(member)

    def set_routing(self, active_ranks: Collection[int], placement: Any = None) -> bool:
        self.routed.append(set(active_ranks))
        return True


def seated(mailbox: Mailbox, parts: Parts) -> ForwardThread:
    forward = ForwardThread(CONFIG, mailbox, lambda item: None, lambda _config: (parts, parts))  # type: ignore[arg-type,return-value]  # all that is used of them
    forward.exchange = forward.runner = parts  # type: ignore[assignment]  # as above
    mailbox.adopt(View(1, (Seat(0, 1, 0), Seat(1, 1, 0), Seat(2, 7, 0))))
    assert forward._take_seat()
    forward._settle_in()
    return forward


def test_a_boundary_routes_around_the_dead_before_the_view_does() -> None:
    mailbox, parts = Mailbox(), Parts()
    forward = seated(mailbox, parts)
    assert parts.routed == [{0, 1, 2}]
    mailbox.peer_died(PEER)
    forward._settle_in()
    assert parts.routed == [{0, 1, 2}, {0, 2}]
    mailbox.adopt(View(2, (Seat(0, 1, 0), Seat(2, 7, 0))))
    forward._settle_in()
    assert len(parts.routed) == 2, "the view brings nothing new"
    mailbox.adopt(View(3, (Seat(0, 1, 0), Seat(1, 2, 0), Seat(2, 7, 0))))
    forward._settle_in()
    assert parts.activated == [PEER, OTHER, Member(1, 2)]
    assert parts.routed[2:] == [{0, 1, 2}], "its next incarnation is another"


def test_whoever_died_before_the_view_that_seats_it_is_not_activated() -> None:
    mailbox, parts = Mailbox(), Parts()
    forward = seated(mailbox, parts)
    assert not mailbox.is_dead(Member(1, 0))
    mailbox.peer_died(Member(1, 3))
    mailbox.peer_died(Member(1, 2))  # news of an older one, late
    mailbox.adopt(View(2, (Seat(0, 1, 0), Seat(1, 3, 0), Seat(2, 7, 0))))
    forward._settle_in()
    assert parts.activated == [PEER, OTHER]
    assert parts.routed[-1] == {0, 2}


@pytest.mark.anyio
async def test_a_rank_masks_a_peer_once_however_often_it_hears() -> None:
    rank, parts = lone_rank(Wire()), Parts()
    rank._slots.start = lambda runner: None  # type: ignore[method-assign]  # there are no weights
    rank._hear(Started())
    rank._hear(PeerDied(OTHER))  # before there is an exchange
    rank._hear(PeerDied(rank._me))
    rank._outbox.post(Ready(parts, parts))  # type: ignore[arg-type]  # all that is used of them
    assert parts.masked == [OTHER]
    rank._hear(PeerDied(PEER))
    issued_ns = rank._mailbox.mask_ns
    rank._hear(PeerDied(PEER))
    assert parts.masked == [OTHER, PEER]
    assert rank._mailbox.mask_ns == issued_ns > 0
    assert rank._mailbox.is_dead(PEER)
    assert not rank._mailbox.is_dead(rank._me)
