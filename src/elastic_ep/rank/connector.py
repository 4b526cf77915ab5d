"""Gets a rank's exchange ready for joiners, and only then lets it promise."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress

import structlog

from elastic_ep.exchange.base import Exchange
from elastic_ep.wire.messages import Member

log = structlog.get_logger()


class Connector:
    """Control loop only. A `slow` exchange meets its peers, who must do the same: on a thread of its own.

    Masks go on meanwhile, and one of them ends the wait for a peer that is gone.
    """

    def __init__(
        self, exchange: Callable[[], Exchange], loop: asyncio.AbstractEventLoop, *, slow: bool
    ) -> None:
        self._exchange = exchange
        self._loop = loop
        self._slow = slow
        self._begun = 0
        self._under_way = False
        self._then: Callable[[], None] | None = None

    def connect(self, members: Sequence[Member]) -> None:
        """Supersedes what is under way: only the outcome of the last call counts."""
        exchange = self._exchange()
        self._then = None
        self._begun += 1
        if not self._slow:
            for member in members:
                exchange.connect(member)
            return
        self._under_way = True
        threading.Thread(
            target=self._main, args=(exchange, members, self._begun), name="connect", daemon=True
        ).start()

    def when_connected(self, then: Callable[[], None]) -> None:
        """Now, or when the last `connect` has succeeded. Never if it fails, or after `forget`."""
        if self._under_way:
            self._then = then
        else:
            then()

    def forget(self) -> None:
        self._then = None

    def _main(self, exchange: Exchange, members: Sequence[Member], number: int) -> None:
        connected = False
        try:
            for member in members:
                exchange.connect(member)
            connected = True
        except Exception as error:  # whatever the store or the library raises: the attempt then fails
            log.warning("cannot connect to joiners", why=f"{type(error).__name__}: {error}")
        with suppress(RuntimeError):  # the loop is closed: this process ends
            self._loop.call_soon_threadsafe(self._ended, number, connected)

    def _ended(self, number: int, connected: bool) -> None:  # call_soon takes no keywords
        if number != self._begun:
            return
        self._under_way = False
        then, self._then = self._then, None
        if connected and then is not None:
            then()
