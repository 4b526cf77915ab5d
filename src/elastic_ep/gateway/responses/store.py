"""Responses that are kept in memory, the oldest of them given up when all take more than a bound."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from elastic_ep.gateway.errors import ApiError
from elastic_ep.gateway.responses.body import Named

MOST_LISTED = 100
"""Items of a request at once."""


@dataclass(eq=False)
class Stored:
    """One response. `items`: its conversation to the end of its output, a JSON array; empty while there is no end.

    One that nobody waits for has its `events` kept as well, and a `task` that makes them.
    """

    asked: tuple[Named, ...]
    response: str = ""
    items: str = ""
    events: list[bytes] = field(default_factory=list)
    task: asyncio.Task[None] | None = None
    over: bool = True
    _size: int = 0
    _more: asyncio.Event = field(default_factory=asyncio.Event)

    def tell(self, events: list[bytes]) -> None:
        self.events += events
        self._more.set()
        self._more = asyncio.Event()

    def end(self) -> None:
        self.over = True
        self.tell([])

    async def follow(self, first: int) -> AsyncIterator[bytes]:
        """The events from number `first` on, those to come as they come."""
        while True:
            more = self._more
            for event in self.events[first:]:
                yield event
            first = max(first, len(self.events))
            if self.over and first >= len(self.events):
                return
            await more.wait()

    @property
    def size(self) -> int:
        asked = sum(len(one.json) for one in self.asked)
        return asked + len(self.response) + len(self.items) + sum(map(len, self.events))


class ResponseStore:
    """By id, the one that was used last at the end."""

    def __init__(self, most_bytes: int) -> None:
        self._most = most_bytes
        self._bytes = 0
        self._kept: OrderedDict[str, Stored] = OrderedDict()

    def put(self, name: str, stored: Stored) -> None:
        """Anew, or again after it has grown. One without room even alone is not kept, nor costs others theirs."""
        self.remove(name)
        stored._size = stored.size
        if stored.over and stored._size > self._most:
            return
        self._bytes += stored._size
        self._kept[name] = stored
        # One that is still being made is not given up: its client has nothing else.
        for old in [one for one, other in self._kept.items() if other.over]:
            if self._bytes <= self._most:
                return
            self.remove(old)

    def get(self, name: str, param: str | None = None) -> Stored:
        """Raises `ApiError`."""
        found = self._kept.get(name)
        if found is None:
            message = f"Response with id '{name[:80]}' not found: it was not stored, or has been given up for others."
            code = "previous_response_not_found" if param else "not_found"
            raise ApiError(message, status=404, param=param, code=code)
        self._kept.move_to_end(name)
        return found

    def remove(self, name: str) -> None:
        old = self._kept.pop(name, None)
        if old is not None:
            self._bytes -= old._size

    def tasks(self) -> list[asyncio.Task[None]]:
        return [one.task for one in self._kept.values() if one.task is not None]
