"""A request that is not complete in time fails then, neither sooner nor later, wherever it is; others get its place."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_ep.machines.contract import Tick
from elastic_ep.machines.requests import events as ev
from elastic_ep.machines.requests.routing import RoutingMachine
from elastic_ep.wire.messages import Assign, Cancel, FailureCode, Member, SamplingParams, Token

TIMEOUT_MS = 1_000
MOVES = st.lists(
    st.tuples(
        st.sampled_from(["submit", "submit", "time", "up", "down", "token", "leave"]), st.integers(0, 700)
    ),
    max_size=40,
)


class Clients:
    """What each request was promised and what became of it."""

    def __init__(self, timeout_ms: int) -> None:
        config = ev.RoutingConfig(max_num_seqs=1, max_queued=100, request_timeout_ms=timeout_ms)
        self.machine = RoutingMachine(config)
        self.timeout_ms = timeout_ms
        self.now_ms = 5_000
        self.due_ms: dict[int, int] = {}
        self.owner: dict[int, Member] = {}
        self.next_id = 0
        self.incarnation = 0

    def feed(self, event: ev.Event) -> None:
        effects = self.machine.step(event)
        self.machine.check()
        overdue = {request for request, due in self.due_ms.items() if self.timeout_ms and due <= self.now_ms}
        timed = isinstance(event, Tick | ev.Submitted)
        for effect in effects:
            match effect:
                case ev.Finish(request_id, "abort", FailureCode.TIMEOUT, detail):
                    assert request_id in overdue, "sooner than was promised"
                    assert "--request-timeout" in detail
                    overdue.remove(request_id)
                    owner = self.owner.pop(request_id, None)
                    told = [
                        e.member
                        for e in effects
                        if isinstance(e, ev.Send) and e.message == Cancel(request_id)
                    ]
                    assert told == ([owner] if owner in self.machine.ranks else []), (
                        "a rank works on for nothing"
                    )
                    del self.due_ms[request_id]
                case ev.Finish(request_id):
                    del self.due_ms[request_id]
                    self.owner.pop(request_id, None)
                case ev.Send(member, Assign() as assign):
                    assert assign.request_id in self.due_ms, "it is over"
                    self.owner[assign.request_id] = member
        assert not (timed and overdue), "later than was promised"
        free = [rank for rank in self.machine.ranks.values() if not rank.requests]
        assert not (free and self.machine.waiting), "it waits beside a free rank"

    def submit(self) -> None:
        asked = ev.NewRequest(self.next_id, (1,), SamplingParams(9), 0, 0)
        self.due_ms[self.next_id] = self.now_ms + self.timeout_ms
        self.next_id += 1
        self.feed(ev.Submitted(asked, self.now_ms))

    def wait(self, ms: int) -> None:
        """As the shell does: a tick at each deadline."""
        end_ms = self.now_ms + ms
        while (due_ms := self.machine.next_deadline_ms()) is not None and due_ms <= end_ms:
            assert due_ms >= self.now_ms
            self.now_ms = due_ms
            self.feed(Tick(due_ms))
        self.now_ms = end_ms

    def move(self, what: str, number: int) -> None:
        ranks = sorted(self.machine.ranks)
        match what:
            case "submit":
                self.submit()
            case "time":
                self.wait(number)
            case "up":
                self.incarnation += 1
                self.feed(ev.RankUp(Member(number % 3, self.incarnation)))
            case "down" if ranks:
                member = ranks[number % len(ranks)]
                self.owner = {request: owner for request, owner in self.owner.items() if owner != member}
                self.feed(ev.RankDown(member, "killed"))
            case "token" if self.owner:
                request_id = sorted(self.owner)[number % len(self.owner)]
                request = self.machine.requests[request_id]
                if request.owner is not None:
                    token = Token(request_id, len(request.emitted), 3, "stop" if number % 2 else None)
                    self.feed(ev.TokensCommitted(request.owner, (token,)))
            case "leave" if self.due_ms:
                request_id = sorted(self.due_ms)[number % len(self.due_ms)]
                del self.due_ms[request_id]
                self.owner.pop(request_id, None)
                self.feed(ev.CancelRequested(request_id))


@given(moves=MOVES)
@settings(max_examples=150, deadline=None)
def test_every_request_fails_when_its_time_is_over(moves: list[tuple[str, int]]) -> None:
    clients = Clients(TIMEOUT_MS)
    for what, number in moves:
        clients.move(what, number)
    clients.wait(TIMEOUT_MS)
    assert not clients.due_ms, "neither complete nor failed"
    assert not clients.machine.requests
    assert clients.machine.next_deadline_ms() is None


@given(moves=MOVES)
@settings(max_examples=30, deadline=None)
def test_without_a_limit_none_fails(moves: list[tuple[str, int]]) -> None:
    clients = Clients(0)
    for what, number in moves:
        clients.move(what, number)
    assert clients.machine.next_deadline_ms() is None
    clients.feed(Tick(clients.now_ms + 1_000_000))
    assert set(clients.machine.requests) == set(clients.due_ms)


def test_a_tick_that_comes_late_or_goes_back_changes_nothing_about_it() -> None:
    clients = Clients(TIMEOUT_MS)
    clients.submit()
    clients.feed(Tick(clients.now_ms - 3_000))
    clients.submit()
    assert [request.due_ms for request in clients.machine.requests.values()] == [6_000, 6_000]
    clients.now_ms = 9_000
    clients.feed(Tick(9_000))
    assert not clients.machine.requests
    clients.feed(Tick(2_000))
    assert clients.machine.now_ms == 9_000
