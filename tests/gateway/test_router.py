"""The router's shell: streams, refusals, and the order in which effects are performed."""

from __future__ import annotations

import asyncio
import base64
from collections import Counter
from collections.abc import Sequence
from typing import Any

import anyio
import pytest
from anyio.lowlevel import checkpoint

from elastic_ep.gateway.router import Router
from elastic_ep.group.hub import Hub
from elastic_ep.group.port import Busy, Stopping, Stream
from elastic_ep.machines.contract import UnexpectedEvent
from elastic_ep.machines.requests import events as ev
from elastic_ep.machines.requests.prefixes import beginnings
from elastic_ep.machines.requests.routing import RoutingMachine
from elastic_ep.wire.codec import to_plain
from elastic_ep.wire.messages import Assign, Cancel, Member, SamplingParams, Token

pytestmark = pytest.mark.anyio

A, B = Member(0, 1), Member(1, 1)
CONFIG = ev.RoutingConfig(max_num_seqs=2, max_queued=2, retry_after_s=7)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


class Rig:
    """A router whose surroundings write down what they are told."""

    def __init__(self) -> None:
        self.sent: list[tuple[Member, Assign | Cancel]] = []
        self.recorded: list[tuple[ev.Event, list[ev.Effect]]] = []
        self.notices: list[ev.Notice] = []
        self.order: list[str] = []
        self.answers: dict[type, ev.Event] = {}
        self.heirs: dict[Member, Counter[Member | None]] = {}
        self.router = Router(
            Hub(self.record, lambda: 0),
            RoutingMachine(CONFIG),
            send=self.send,
            notify=self.notify,
            taken_over=self.heirs.__setitem__,
        )

    def send(self, member: Member, message: Assign | Cancel) -> None:
        self.sent.append((member, message))
        self.order.append("send")

    def record(self, machine: str, event: Any, effects: Sequence[Any], cause: int = 0) -> None:
        assert machine == "routing"
        self.recorded.append((event, list(effects)))
        self.order.append("record")

    def notify(self, notice: ev.Notice) -> None:
        self.notices.append(notice)
        self.order.append("notify")
        if type(notice) in self.answers:
            self.router.handle(self.answers[type(notice)])

    def submit(self, max_tokens: int = 8) -> Stream:
        return self.router.submit((1, 2), SamplingParams(max_tokens), 3, 0)

    def commit(self, member: Member, *tokens: Token) -> None:
        self.router.handle(ev.TokensCommitted(member, tokens))


async def collect(stream: Stream) -> list[tuple[int, ...]]:
    return [tuple(token.token for token in batch) async for batch in stream]


async def test_prompts_that_begin_alike_have_marks_in_common_and_no_event_has_what_they_begin_with() -> None:
    rig = Rig()
    rig.router.handle(ev.RankUp(A))
    for number, prompt in enumerate([(1, 2, 3, 4) * 16, (1, 2, 3, 4) * 12 + (5,) * 16]):
        rig.router.submit(prompt, SamplingParams(8), 3, number, beginnings(prompt, 16))
    asked = [event.request for event, _ in rig.recorded if isinstance(event, ev.Submitted)]
    assert [request.marks for request in asked] == [(0, 1, 2, 3), (0, 1, 2, 4)]
    logged = str([to_plain(event) for event, _ in rig.recorded])
    assert not any(base64.b64encode(each).decode() in logged for each in beginnings((1, 2, 3, 4) * 16, 16))


async def test_a_stream_gives_what_is_ready_and_ends() -> None:
    rig = Rig()
    rig.router.handle(ev.RankUp(A))
    stream = rig.submit()
    rig.commit(A, Token(0, 0, 10))
    rig.commit(A, Token(0, 1, 11))
    assert [token.token for token in await anext(stream)] == [10, 11]
    rig.commit(A, Token(0, 2, 12, "stop"))
    assert await collect(stream) == [(12,)]
    assert await collect(stream) == []
    assert rig.router.running == 0


async def test_a_stream_that_gathers_wakes_nobody_before_there_are_enough_and_hides_no_end() -> None:
    rig = Rig()
    rig.router.handle(ev.RankUp(A))
    stream, came = rig.submit(), list[int]()
    rig.commit(A, Token(0, 0, 10))
    stream.gather(3, came.append)
    batches: list[tuple[int, ...]] = []

    async def read() -> None:
        batches.extend(await collect(stream))

    async with anyio.create_task_group() as tasks:
        first = asyncio.ensure_future(anext(stream))
        rig.commit(A, Token(0, 1, 11))
        await anyio.wait_all_tasks_blocked()
        assert not first.done()
        assert came == [1, 1]
        rig.commit(A, Token(0, 2, 12))
        assert [token.token for token in await first] == [10, 11, 12]
        tasks.start_soon(read)
        await anyio.wait_all_tasks_blocked()
        rig.commit(A, Token(0, 3, 13, "stop"))
    assert batches == [(13,)]
    assert came == [1, 1, 1, 1]


async def test_a_stream_that_gathers_ends_when_its_request_fails() -> None:
    rig = Rig()
    rig.router.handle(ev.RankUp(A))
    stream = rig.submit()
    stream.gather(3, lambda _count: None)
    rig.commit(A, Token(0, 0, 10))
    rig.router.handle(ev.NothingWillServe("all are gone"))
    assert await collect(stream) == [(10,)]
    assert stream.failure is not None


async def test_a_stream_knows_when_ranks_were_given_it() -> None:
    rig = Rig()
    stream = rig.submit()
    seen = [stream.assigned_s]
    rig.router.handle(ev.RankUp(A))
    rig.commit(A, Token(0, 0, 10))
    rig.router.handle(ev.RankDown(A, "died"))
    moves_without_a_rank = len(stream.moved_s)
    seen.append(stream.assigned_s)
    for member in (B, Member(0, 2)):
        rig.router.handle(ev.RankUp(member))
        rig.router.handle(ev.RankDown(member, "died"))
    before, first, last = *seen, stream.assigned_s
    assert before is None
    assert first is not None
    assert first == last
    assert (moves_without_a_rank, len(stream.moved_s)) == (0, 2)
    assert first <= stream.moved_s[0] <= stream.moved_s[1]


async def test_a_waiting_consumer_wakes() -> None:
    rig = Rig()
    rig.router.handle(ev.RankUp(A))
    stream = rig.submit()
    heard: list[tuple[int, ...]] = []

    async def consume() -> None:
        heard.extend(await collect(stream))

    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(consume)
            for index in range(3):
                await anyio.wait_all_tasks_blocked()
                rig.commit(A, Token(0, index, index, "stop" if index == 2 else None))
    assert heard == [(0,), (1,), (2,)]


async def test_a_stream_survives_its_rank() -> None:
    rig = Rig()
    rig.router.handle(ev.RankUp(A))
    rig.router.handle(ev.RankUp(B))
    stream = rig.submit()
    rig.commit(A, Token(0, 0, 10))
    rig.router.handle(ev.RankDown(A, "killed"))
    rig.commit(A, Token(0, 1, 666))
    rig.commit(B, Token(0, 1, 11, "stop"))
    assert await collect(stream) == [(10, 11)]
    assert rig.sent[-1] == (B, Assign(0, (1, 2), (10,), SamplingParams(8), 3, 0))
    assert ev.Replayed(0, A) in rig.notices
    assert rig.heirs == {A: Counter({B: 1})}


async def test_a_stream_that_waits_in_a_rank_moves() -> None:
    rig = Rig()
    rig.router.handle(ev.RankUp(A))
    streams = [rig.submit() for _ in range(3)]
    rig.router.handle(ev.RankUp(B))
    assert rig.sent[-2:] == [(A, Cancel(2)), (B, Assign(2, (1, 2), (), SamplingParams(8), 3, 0))]
    assert rig.notices[-1] == ev.Moved(2, A)
    rig.commit(A, Token(2, 0, 666))
    rig.commit(B, Token(2, 0, 10, "stop"))
    assert await collect(streams[2]) == [(10,)]


async def test_cancel_reaches_the_rank_once_and_ends_the_stream() -> None:
    rig = Rig()
    rig.router.handle(ev.RankUp(A))
    stream = rig.submit()
    rig.commit(A, Token(0, 0, 10))
    stream.cancel()
    stream.cancel()
    assert await collect(stream) == []
    assert [message for _, message in rig.sent if isinstance(message, Cancel)] == [Cancel(0)]
    rig.commit(A, Token(0, 1, 11))
    assert rig.router.machine.stale_tokens == 1


async def test_cancel_wakes_a_waiting_consumer() -> None:
    rig = Rig()
    stream = rig.submit()
    with anyio.fail_after(5):
        async with anyio.create_task_group() as group:
            group.start_soon(collect, stream)
            await anyio.wait_all_tasks_blocked()
            stream.cancel()


async def test_cancel_after_the_end_is_no_event() -> None:
    rig = Rig()
    rig.router.handle(ev.RankUp(A))
    stream = rig.submit()
    rig.commit(A, Token(0, 0, 10, "stop"))
    before = len(rig.recorded)
    stream.cancel()
    assert len(rig.recorded) == before
    assert await collect(stream) == []


async def test_a_consumer_that_is_cancelled_loses_nothing() -> None:
    rig = Rig()
    rig.router.handle(ev.RankUp(A))
    stream = rig.submit()
    with anyio.move_on_after(0):
        await anext(stream)
    rig.commit(A, Token(0, 0, 10))
    await checkpoint()
    assert [token.token for token in await anext(stream)] == [10]


async def test_forced_stop_ends_streams_without_a_finish() -> None:
    rig = Rig()
    rig.router.handle(ev.RankUp(A))
    streams = [rig.submit(), rig.submit()]
    rig.commit(A, Token(0, 0, 10))
    rig.router.handle(ev.StopRequested())
    rig.router.handle(ev.DeadlinePassed())
    assert [await collect(stream) for stream in streams] == [[(10,)], []]
    assert rig.notices[-1] == ev.Drained()


async def test_busy_and_stopping() -> None:
    rig = Rig()
    rig.submit()
    rig.submit()
    with pytest.raises(Busy) as busy:
        rig.submit()
    assert busy.value.retry_after_s == 7
    assert (rig.router.running, rig.router.waiting) == (0, 2)
    rig.router.handle(ev.StopRequested())
    with pytest.raises(Stopping):
        rig.submit()
    assert rig.router._streams.keys() == {0, 1}


async def test_nothing_is_kept_of_requests_that_ended() -> None:
    rig = Rig()
    rig.router.handle(ev.RankUp(A))
    rig.submit().cancel()
    rig.submit()
    rig.commit(A, Token(1, 0, 10, "stop"))
    assert not rig.router._streams
    assert not rig.router.machine.requests


async def test_the_record_comes_after_sends_and_before_notices() -> None:
    rig = Rig()
    rig.router.handle(ev.RankUp(A))
    rig.order.clear()
    rig.submit()
    assert rig.order == ["send", "record", "notify"]
    assert rig.notices == [ev.WorkBegan()]


async def test_events_that_arise_meanwhile_wait_their_turn() -> None:
    """The controller fences a faulty rank: the router hears of it from within its own notice."""
    rig = Rig()
    rig.answers[ev.Fault] = ev.RankDown(A, "fenced")
    rig.router.handle(ev.RankUp(A))
    rig.submit()
    rig.commit(A, Token(0, 5, 10))
    assert [type(event) for event, _ in rig.recorded[-2:]] == [ev.TokensCommitted, ev.RankDown]
    assert rig.notices[1:] == [ev.Fault(A, "request 0: token 5 came before 0"), ev.Replayed(0, A)]
    rig.router.handle(ev.RankUp(B))
    assert rig.sent[-1][0] == B


async def test_the_notices_of_one_event_stay_together() -> None:
    rig = Rig()
    rig.answers[ev.Replayed] = ev.DeadlinePassed()
    rig.router.handle(ev.RankUp(A))
    rig.submit()
    rig.submit()
    rig.router.handle(ev.RankDown(A, "killed"))
    assert rig.notices[1:] == [ev.Replayed(0, A), ev.Replayed(1, A), ev.WorkEnded(), ev.Drained()]


async def test_an_unexpected_event_leaves_the_router_working() -> None:
    rig = Rig()
    rig.router.handle(ev.RankUp(A))
    with pytest.raises(UnexpectedEvent):
        rig.router.handle(ev.RankUp(A))
    stream = rig.submit()
    rig.commit(A, Token(0, 0, 10, "stop"))
    assert await collect(stream) == [(10,)]


async def test_serving_ranks() -> None:
    rig = Rig()
    rig.router.handle(ev.RankUp(A))
    rig.router.handle(ev.RankUp(B))
    rig.router.handle(ev.RankDraining(B))
    assert rig.router.serving_ranks() == 1


async def test_the_record_replays() -> None:
    """Fresh machine, same events: same effects. Nothing that decides is outside the machine."""
    rig = Rig()
    rig.router.handle(ev.RankUp(A))
    rig.router.handle(ev.RankUp(B))
    rig.submit()
    rig.submit().cancel()
    rig.commit(A, Token(0, 0, 10))
    rig.router.handle(ev.RankDown(A, "killed"))
    rig.commit(B, Token(0, 1, 11, "stop"))
    fresh = RoutingMachine(CONFIG)
    assert [(event, fresh.step(event)) for event, _ in rig.recorded] == rig.recorded
