"""What goes to the ranks, a bounded amount a turn of the event loop.

A long prompt takes its time to encode, and one event can cause many messages that hold one, or very many short ones: a
rank is lost, one is back, a client with many choices leaves.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from elastic_ep.placement import Placement
from elastic_ep.wire.messages import Assign, Cancel, Member, Snapshot, ToRank

LONG = 1024
"""A message that costs so much waits for the next turn, and what comes after it for the same rank with it."""
A_TURN = 32_768
"""So much is sent in a turn, and at least one message: a few milliseconds."""
_MESSAGE, _BIAS = 256, 16


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
        self._left = A_TURN
        """Of this turn."""
        self._due = False
        """The next turn is waited for."""

    def put(self, member: Member, message: ToRank) -> None:
        queue = self._waiting.get(member)
        if queue is not None:
            if not (isinstance(message, Cancel) and _forget(queue, message.request_id)):
                queue.append(message)
        elif (price := cost(message)) < LONG and self._left > 0:
            self._pay(price)
            self._send(member, message)
        else:
            self._waiting[member] = deque([message])
            self._await_turn()

    def _turn(self) -> None:
        self._due = False
        self._left = A_TURN
        try:
            while self._waiting and self._left > 0:
                member, queue = next(iter(self._waiting.items()))
                del self._waiting[member]
                if not queue:
                    continue
                message = queue.popleft()
                if queue:
                    self._waiting[member] = queue  # the others come first
                self._pay(cost(message))
                self._send(member, message)
        finally:
            if self._waiting:
                self._await_turn()

    def _pay(self, price: int) -> None:
        self._left -= price
        self._await_turn()

    def _await_turn(self) -> None:
        if not self._due:
            self._due = True
            self._later(self._turn)


def cost(message: ToRank) -> int:
    """What it takes to encode and send it, in tokens of a prompt."""
    match message:
        case Assign(_, prompt, emitted, params):
            tokens = len(prompt) + len(emitted) + len(params.stop_token_ids) + len(params.allowed_token_ids)
            return _MESSAGE + tokens + _BIAS * len(params.logit_bias)
        case Snapshot(placement=Placement() as placement):
            return _MESSAGE + sum(len(row) for row in placement.slots)
    return _MESSAGE


def _forget(queue: deque[ToRank], request_id: int) -> bool:
    """Whether the request was in the queue still."""
    for message in queue:
        if isinstance(message, Assign) and message.request_id == request_id:
            queue.remove(message)
            return True
    return False
