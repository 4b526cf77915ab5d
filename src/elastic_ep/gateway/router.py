"""The router's shell: performs what the routing machine decides, and gives each client its stream.

Everything runs on the run process's event loop, and nothing here waits but a stream for its next tokens: no
task and no timer per request.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence

import anyio

from elastic_ep.group.port import Busy, Failure, Refused, Stopping, Unavailable
from elastic_ep.machines.requests import events as ev
from elastic_ep.machines.requests.events import Effect, Event, RoutingConfig
from elastic_ep.machines.requests.routing import RoutingMachine
from elastic_ep.wire.codec import MalformedMessage, check
from elastic_ep.wire.messages import Assign, Cancel, Member, SamplingParams, Token

Notice = ev.WorkBegan | ev.WorkEnded | ev.Drained | ev.Fault | ev.Replayed | ev.Moved
"""Effects that concern the rest of the run process."""


class RoutedStream:
    """The tokens of one request, in batches of what is ready; for one consumer.

    It ends after the token whose `finish` is set; without one if the request was cancelled or has failed, which
    `failure` then explains.
    """

    __slots__ = ("_cancel", "_ended", "_ready", "_refusal", "_wake", "failure", "request_id")

    def __init__(self, request_id: int, cancel: Callable[[int], None]) -> None:
        self.request_id = request_id
        self._cancel = cancel
        self._ready: deque[Token] = deque()
        self._wake: anyio.Event | None = None
        self._ended = False
        self._refusal: ev.Refuse | None = None
        self.failure: Failure | None = None

    def __aiter__(self) -> RoutedStream:
        return self

    async def __anext__(self) -> tuple[Token, ...]:
        while not self._ready:
            if self._ended:
                raise StopAsyncIteration
            self._wake = anyio.Event()
            await self._wake.wait()
        batch = tuple(self._ready)
        self._ready.clear()
        return batch

    def cancel(self) -> None:
        """Stop generating and forget what is ready. Idempotent, and no error after the end."""
        self._ready.clear()
        if not self._ended:
            self._cancel(self.request_id)
            self._end()

    def _deliver(self, tokens: tuple[Token, ...]) -> None:
        self._ready.extend(tokens)
        if self._wake is not None:
            self._wake.set()

    def _end(self, failure: Failure | None = None) -> None:
        self._ended = True
        self.failure = failure
        if self._wake is not None:
            self._wake.set()


class Router:
    """Owns the routing machine; `machine` may be read, and is fed by `handle` and `submit` only.

    `send` puts a message on the wire and must not raise. `notify` hears what concerns others. `record` gets
    every event with its effects, in order and after the effects that somebody waits for, before the notices:
    so the log shows a cause before what other machines make of it. All three may call `handle`: such an event
    is taken after the present one.
    """

    def __init__(
        self,
        config: RoutingConfig,
        *,
        send: Callable[[Member, Assign | Cancel], None],
        record: Callable[[str, Event, Sequence[Effect]], None],
        notify: Callable[[Notice], None],
    ) -> None:
        self.machine = RoutingMachine(config)
        self._send = send
        self._record = record
        self._notify = notify
        self._streams: dict[int, RoutedStream] = {}
        self._next_id = 0
        self._events: deque[Event] = deque()
        self._handling = False
        self._timer: asyncio.TimerHandle | None = None

    # For clients

    def submit(self, prompt: tuple[int, ...], params: SamplingParams, seed: int, choice: int) -> RoutedStream:
        """Queue one request. Raises `Busy`, `Refused`, `Unavailable` and `Stopping`. Not to be called from `handle`."""
        if self._handling:
            raise RuntimeError("submit was called from within handle")
        request = ev.NewRequest(self._next_id, prompt, params, seed, choice)
        try:
            check(request, ev.NewRequest)  # a rank would refuse it too, but much later
        except MalformedMessage as error:
            raise Refused(str(error)) from error
        stream = RoutedStream(self._next_id, self._on_cancel)
        self._next_id += 1
        self._streams[stream.request_id] = stream
        self.handle(ev.Submitted(request, _now_ms()))
        if stream._refusal is None:
            self._set_timer()
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

    # For the rest of the run process

    def handle(self, event: Event) -> None:
        """Take one event and perform its effects. Raises `UnexpectedEvent`, with nothing changed."""
        self._events.append(event)
        if self._handling:
            return
        self._handling = True
        try:
            while self._events:
                self._take(self._events.popleft())
        finally:
            self._handling = False

    def take_over(self, member: Member, reason: str) -> Counter[Member | None]:
        """`RankDown`; who has the member's requests now, and how many of them. None: they wait, or have failed."""
        rank = self.machine.ranks.get(member)
        lost = tuple(rank.requests) if rank else ()
        self.handle(ev.RankDown(member, reason))
        requests = self.machine.requests
        return Counter(requests[each].owner if each in requests else None for each in lost)

    def _set_timer(self) -> None:
        """One is enough: it is set anew when it has rung, so the tokens that come in need not look at it."""
        due_ms = self.machine.next_deadline_ms()
        if self._timer is None and due_ms is not None:
            delay_s = max(0, due_ms - _now_ms()) / 1000
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._on_timer)

    def _on_timer(self) -> None:
        self._timer = None
        self.handle(ev.Tick(_now_ms()))
        self._set_timer()

    def _on_cancel(self, request_id: int) -> None:
        self._streams.pop(request_id, None)
        self.handle(ev.CancelRequested(request_id))

    def _take(self, event: Event) -> None:
        effects = self.machine.step(event)
        notices: list[Notice] = []
        for effect in effects:
            match effect:
                case ev.Deliver(request_id, tokens):
                    # A stream that was cancelled within this very event loop turn is gone already.
                    if stream := self._streams.get(request_id):
                        stream._deliver(tokens)
                case ev.Send(member, message):
                    self._send(member, message)
                case ev.Finish(request_id, _, code, detail):
                    if stream := self._streams.pop(request_id, None):
                        stream._end(Failure(code, detail) if code else None)
                case ev.Refuse(request_id):
                    self._streams.pop(request_id)._refusal = effect
                case _:
                    notices.append(effect)
        self._record("routing", event, effects)
        for notice in notices:
            self._notify(notice)


def _now_ms() -> int:
    return int(time.monotonic() * 1000)


def _refused(refusal: ev.Refuse) -> Exception:
    match refusal.reason:
        case "stopping":
            return Stopping()
        case "unavailable":
            return Unavailable(refusal.detail, refusal.retry_after_s)
    return Busy(refusal.retry_after_s)
