"""What goes to the ranks, a bounded amount a turn of the event loop.

A long prompt takes its time to encode, and one event can cause many messages that hold one: a rank is back, a client
with many choices leaves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from elastic_ep.wire.messages import Assign, Cancel, Member, ToRank

LONG_TOKENS = 1024
"""A message with so many waits for the next turn, and what comes after it for the same rank with it."""
TURN_TOKENS = 32_768
"""So many are encoded in a turn, and at least one message: a few milliseconds."""


class Outbox:
    """The order of the messages to one rank is kept. A request that is cancelled before it went out never does.

    `send` encodes and sends, `later` calls in the next turn.
    """

    def __init__(
        self, send: Callable[[Member, ToRank], None], later: Callable[[Callable[[], None]], None]
    ) -> None:
        self._send = send
        self._later = later
        self._waiting: dict[Member, deque[ToRank]] = {}

    def put(self, member: Member, message: ToRank) -> None:
        queue = self._waiting.get(member)
        if queue is None and _tokens(message) < LONG_TOKENS:
            self._send(member, message)
        elif queue is None:
            if not self._waiting:
                self._later(self._turn)
            self._waiting[member] = deque([message])
        elif not (isinstance(message, Cancel) and _forget(queue, message.request_id)):
            queue.append(message)

    def _turn(self) -> None:
        left = TURN_TOKENS
        while self._waiting and left > 0:
            member, queue = next(iter(self._waiting.items()))
            del self._waiting[member]
            if not queue:
                continue
            message = queue.popleft()
            left -= _tokens(message)
            if queue:
                self._waiting[member] = queue  # the others come first
            self._send(member, message)
        if self._waiting:
            self._later(self._turn)


def _tokens(message: ToRank) -> int:
    return len(message.prompt) + len(message.emitted) if isinstance(message, Assign) else 0


def _forget(queue: deque[ToRank], request_id: int) -> bool:
    """Whether the request was in the queue still."""
    for message in queue:
        if isinstance(message, Assign) and message.request_id == request_id:
            queue.remove(message)
            return True
    return False
