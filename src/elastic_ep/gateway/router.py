"""The router's shell: performs what the routing machine decides, and gives each client its stream.

Everything runs on the run process's event loop, and nothing here waits but a stream for its next tokens: no
task and no timer a request.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import get_args

from elastic_ep.group.hub import Hub
from elastic_ep.group.port import Busy, Failure, Refused, Stopping, Unavailable
from elastic_ep.machines.requests import events as ev
from elastic_ep.machines.requests.events import Effect, Event
from elastic_ep.machines.requests.prefixes import MarkNumbers
from elastic_ep.machines.requests.routing import RoutingMachine
from elastic_ep.wire.codec import MalformedMessage, check
from elastic_ep.wire.messages import Assign, Cancel, Member, SamplingParams, Token

_NOTICES = get_args(ev.Notice)


class RoutedStream:
    """The tokens of one request, in batches of what is ready; for one consumer.

    It ends after the token whose `finish` is set; without one if the request was cancelled or has failed, which
    `failure` then explains.
    """

    __slots__ = (
        "_came", "_cancel", "_ended", "_least", "_ready", "_refusal", "_wake", "assigned_s", "cached_tokens",
        "failure", "moved_s", "request_id",
    )  # fmt: skip

    def __init__(self, request_id: int, cancel: Callable[[int], None]) -> None:
        self.request_id = request_id
        self._cancel = cancel
        self._ready: deque[Token] = deque()
        self._least = 1
        self._came: Callable[[int], None] | None = None
        self._wake: asyncio.Future[None] | None = None
        self._ended = False
        self._refusal: ev.Refuse | None = None
        self.failure: Failure | None = None
        self.cached_tokens = 0
        self.assigned_s: float | None = None
        self.moved_s: tuple[float, ...] = ()

    def __aiter__(self) -> RoutedStream:
        return self

    async def __anext__(self) -> tuple[Token, ...]:
        while len(self._ready) < self._least and not self._ended:
            self._wake = asyncio.get_running_loop().create_future()
            await self._wake
        if not self._ready:
            raise StopAsyncIteration
        batch = tuple(self._ready)
        self._ready.clear()
        return batch

    def gather(self, least: int, came: Callable[[int], None]) -> None:
        """From now on a batch has `least` tokens or more, unless it is the last; `came` hears at once how many come."""
        self._least, self._came = least, came
        if self._ready:
            came(len(self._ready))

    def cancel(self) -> None:
        """Stop generating and forget what is ready. Idempotent, and no error after the end."""
        self._ready.clear()
        if not self._ended:
            self._cancel(self.request_id)
            self._end()

    def _deliver(self, tokens: tuple[Token, ...]) -> None:
        self._ready.extend(tokens)
        if self._came is not None:
            self._came(len(tokens))
        if len(self._ready) >= self._least:
            self._rouse()

    def _given_to_a_rank(self) -> None:
        now_s = time.monotonic()
        if self.assigned_s is None:
            self.assigned_s = now_s
        else:
            self.moved_s = (*self.moved_s, now_s)

    def _end(self, failure: Failure | None = None) -> None:
        self._ended = True
        self.failure = failure
        self._rouse()

    def _rouse(self) -> None:
        if self._wake is not None and not self._wake.done():
            self._wake.set_result(None)


class Router:
    """The routing machine's shell; `machine` may be read.

    `send` puts a message on the wire and must not raise. `notify` hears what concerns others, `taken_over` how many of
    a lost member's requests went on where (None: they wait, or have failed).
    """

    def __init__(
        self,
        hub: Hub,
        machine: RoutingMachine,
        *,
        send: Callable[[Member, Assign | Cancel], None],
        notify: Callable[[ev.Notice], None],
        taken_over: Callable[[Member, Counter[Member | None]], None],
    ) -> None:
        self.machine = machine
        self._hub = hub
        self._send = send
        self._notify = notify
        self._taken_over = taken_over
        self._streams: dict[int, RoutedStream] = {}
        self._next_id = 0
        self._marks = MarkNumbers()
        hub.attach("routing", machine, self, clocked=False)

    # For clients

    def submit(
        self,
        prompt: tuple[int, ...],
        params: SamplingParams,
        seed: int,
        choice: int,
        beginnings: tuple[bytes, ...] = (),
    ) -> RoutedStream:
        """Queue one request. Raises `Busy`, `Refused`, `Unavailable` and `Stopping`. Not to be called by a shell."""
        request = ev.NewRequest(self._next_id, prompt, params, seed, choice, self._marks.of(beginnings))
        try:
            check(request, ev.NewRequest)  # a rank would refuse it too, but much later
        except MalformedMessage as error:
            raise Refused(str(error)) from error
        stream = RoutedStream(self._next_id, self._on_cancel)
        self._next_id += 1
        self._streams[stream.request_id] = stream
        self.handle(ev.Submitted(request, self._hub.now_ms()))
        if stream._refusal is None:
            return stream
        raise _refused(stream._refusal)

    def serving_ranks(self) -> int:
        """How many ranks take new requests."""
        return sum(rank.accepting for rank in self.machine.ranks.values())

    @property
    def running(self) -> int:
        """Requests that a rank has."""
        return self.machine.running

    @property
    def waiting(self) -> int:
        """Requests that no rank has."""
        return len(self.machine.waiting)

    def handle(self, event: Event) -> None:
        """Raises `UnexpectedEvent`, with nothing changed."""
        self._hub.post("routing", event)

    def _on_cancel(self, request_id: int) -> None:
        self._streams.pop(request_id, None)
        self.handle(ev.CancelRequested(request_id))

    # What the hub calls

    def at_once(self, effects: Sequence[Effect]) -> None:
        for effect in effects:
            match effect:
                case ev.Deliver(request_id, tokens):
                    # A stream that was cancelled within this very event loop turn is gone already.
                    if stream := self._streams.get(request_id):
                        stream._deliver(tokens)
                case ev.Send(member, message):
                    self._send(member, message)
                    if type(message) is Assign and (stream := self._streams.get(message.request_id)):
                        stream._given_to_a_rank()
                case ev.FromCache(request_id, count):
                    if stream := self._streams.get(request_id):
                        stream.cached_tokens = count
                case ev.Finish(request_id, _, code, detail):
                    if stream := self._streams.pop(request_id, None):
                        stream._end(Failure(code, detail) if code else None)
                case ev.Refuse(request_id):
                    self._streams.pop(request_id)._refusal = effect

    def perform(self, event: Event, effects: Sequence[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, _NOTICES):
                self._notify(effect)
        if isinstance(event, ev.RankDown):
            self._taken_over(event.member, self._heirs(effects))

    def _heirs(self, effects: Sequence[Effect]) -> Counter[Member | None]:
        """Of the requests that a rank's end has moved, who has them now."""
        requests = self.machine.requests
        moved = [effect.request_id for effect in effects if isinstance(effect, (ev.Replayed, ev.Finish))]
        return Counter(requests[each].owner if each in requests else None for each in moved)


def _refused(refusal: ev.Refuse) -> Exception:
    match refusal.reason:
        case "stopping":
            return Stopping()
        case "unavailable":
            return Unavailable(refusal.detail, refusal.retry_after_s)
    return Busy(refusal.retry_after_s)
