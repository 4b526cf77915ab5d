"""A slow exchange connects beside the control loop; a promise waits for it, and only for the newest attempt."""

from __future__ import annotations

import asyncio
import queue
from typing import cast

import pytest

from elastic_ep.exchange.base import Exchange
from elastic_ep.rank.connector import Connector
from elastic_ep.wire.messages import Member

PEER, OTHER = Member(1, 1), Member(2, 1)
DEADLINE_S = 10.0


class SlowExchange:
    """`connect` returns when the test lets it."""

    def __init__(self) -> None:
        self.connecting: queue.SimpleQueue[Member] = queue.SimpleQueue()
        self._outcomes: dict[Member, queue.SimpleQueue[Exception | None]] = {
            member: queue.SimpleQueue() for member in (PEER, OTHER)
        }

    def let(self, member: Member, error: Exception | None = None) -> None:
        self._outcomes[member].put(error)

    def connect(self, member: Member) -> None:
        self.connecting.put(member)
        outcome = self._outcomes[member].get(timeout=DEADLINE_S)
        if outcome is not None:
            raise outcome


class Loop:
    def __init__(self, *, slow: bool) -> None:
        self.exchange = SlowExchange()
        self.connector = Connector(
            lambda: cast(Exchange, self.exchange), asyncio.get_running_loop(), slow=slow
        )
        self.promised: list[str] = []
        self.news = asyncio.Event()

    def promise(self, name: str) -> None:
        def then() -> None:
            self.promised.append(name)
            self.news.set()

        self.connector.when_connected(then)

    async def heard(self) -> list[str]:
        await asyncio.wait_for(self.news.wait(), DEADLINE_S)
        self.news.clear()
        return self.promised


def test_a_fast_exchange_is_ready_at_once() -> None:
    async def main() -> None:
        loop = Loop(slow=False)
        loop.exchange.let(PEER)
        loop.connector.connect([PEER])
        loop.promise("first")
        assert loop.promised == ["first"]

    asyncio.run(main())


def test_the_promise_waits_until_all_are_connected() -> None:
    async def main() -> None:
        loop = Loop(slow=True)
        loop.connector.connect([PEER, OTHER])
        loop.promise("first")
        assert loop.promised == []
        loop.exchange.let(PEER)
        loop.exchange.let(OTHER)
        assert await loop.heard() == ["first"]
        assert [loop.exchange.connecting.get() for _ in range(2)] == [PEER, OTHER]

    asyncio.run(main())


def test_an_attempt_that_is_over_promises_nothing() -> None:
    async def main() -> None:
        loop = Loop(slow=True)
        loop.connector.connect([PEER])
        loop.promise("first")
        loop.connector.forget()
        loop.connector.connect([OTHER])
        loop.promise("second")
        loop.exchange.let(PEER)
        loop.exchange.let(OTHER)
        assert await loop.heard() == ["second"]

    asyncio.run(main())


def test_who_cannot_connect_does_not_promise(capfd: pytest.CaptureFixture[str]) -> None:
    async def main() -> None:
        loop = Loop(slow=True)
        loop.connector.connect([PEER])
        loop.promise("first")
        loop.exchange.let(PEER, ConnectionError("gone"))
        loop.connector.connect([OTHER])
        loop.promise("second")
        loop.exchange.let(OTHER)
        assert await loop.heard() == ["second"]

    asyncio.run(main())
    said = "".join(capfd.readouterr())
    assert "cannot connect" in said
    assert "ConnectionError: gone" in said
