"""The routing machine, rule by rule, and under hypothesis with ranks that die at any time."""

from __future__ import annotations

import zlib
from collections import defaultdict, deque
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from elastic_ep.machines.contract import UnexpectedEvent
from elastic_ep.machines.requests import events as ev
from elastic_ep.machines.requests.lifecycle import RequestState
from elastic_ep.machines.requests.prefixes import MarkNumbers, beginnings
from elastic_ep.machines.requests.routing import RoutingMachine
from elastic_ep.wire.messages import Assign, Cached, Cancel, FailureCode, Member, SamplingParams, Token

A, A2, B, C = Member(0, 1), Member(0, 2), Member(1, 1), Member(2, 1)


def oracle(request_id: int, index: int) -> int:
    """The one right token of a request at an index."""
    return zlib.crc32(f"{request_id}/{index}".encode()) % 1000


def new(request_id: int, max_tokens: int = 4) -> ev.Submitted:
    return ev.Submitted(ev.NewRequest(request_id, (7, request_id), SamplingParams(max_tokens), 5, 0))


def tokens(member: Member, *items: tuple[int, int] | tuple[int, int, str]) -> ev.TokensCommitted:
    """(request, index) or (request, index, finish)."""
    return ev.TokensCommitted(
        member, tuple(Token(item[0], item[1], oracle(item[0], item[1]), *item[2:]) for item in items)
    )


def assigned(effects: list[ev.Effect]) -> dict[int, Member]:
    return {
        e.message.request_id: e.member
        for e in effects
        if isinstance(e, ev.Send) and isinstance(e.message, Assign)
    }


def stopped(request_id: int) -> ev.Finish:
    why = "the server stopped before the request was complete"
    return ev.Finish(request_id, "abort", FailureCode.ABORTED, why)


def run(machine: RoutingMachine, *events: ev.Event) -> list[ev.Effect]:
    """The effects of the last event."""
    effects: list[ev.Effect] = []
    for event in events:
        effects = machine.step(event)
        machine.check()
    return effects


def machine_of(max_num_seqs: int = 4, **config: float) -> RoutingMachine:
    return RoutingMachine(ev.RoutingConfig(max_num_seqs, **{"max_queued": 1024, **config}))  # type: ignore[arg-type]  # of any field


def test_a_request_from_submit_to_finish() -> None:
    machine = machine_of()
    assert run(machine, ev.RankUp(A)) == []
    assert run(machine, new(0, max_tokens=2)) == [
        ev.WorkBegan(),
        ev.Send(A, Assign(0, (7, 0), (), SamplingParams(2), 5, 0)),
    ]
    assert machine.request_state(0) is RequestState.RUNNING
    first, last = tokens(A, (0, 0)), tokens(A, (0, 1, "length"))
    assert run(machine, first) == [ev.Deliver(0, first.tokens)]
    assert run(machine, last) == [ev.Deliver(0, last.tokens), ev.Finish(0, "length"), ev.WorkEnded()]
    assert (machine.request_state(0), machine.running, machine.requests) == (None, 0, {})


def test_least_loaded_then_longest_not_chosen() -> None:
    machine = machine_of()
    run(machine, ev.RankUp(A), ev.RankUp(B))
    assert [assigned(run(machine, new(i)))[i] for i in range(4)] == [A, B, A, B]
    run(machine, tokens(A, (0, 0, "stop"), (2, 0, "stop")))
    assert assigned(run(machine, new(4))) == {4: A}
    run(machine, tokens(A, (4, 0, "stop")), tokens(B, (1, 0, "stop"), (3, 0, "stop")))
    assert assigned(run(machine, new(5))) == {5: B}


def test_the_rest_waits_in_order() -> None:
    machine = machine_of(max_num_seqs=1, overcommit=2.0)
    run(machine, ev.RankUp(A), *(new(i) for i in range(5)))
    assert (machine.running, list(machine.waiting)) == (2, [2, 3, 4])
    assert assigned(run(machine, tokens(A, (1, 0, "stop")))) == {2: A}
    assert assigned(run(machine, ev.CancelRequested(0))) == {3: A}
    assert assigned(run(machine, ev.RankUp(B))) == {3: B, 4: A}


def test_a_lost_rank_is_replayed_to_survivors_first() -> None:
    machine = machine_of(max_num_seqs=2, overcommit=1.0, replay_overcommit=2.0)
    run(machine, ev.RankUp(A), ev.RankUp(B), *(new(i) for i in range(5)))
    assert list(machine.waiting) == [4]
    run(machine, tokens(A, (0, 0), (0, 1), (2, 0)))
    effects = run(machine, ev.RankDown(A, "killed"))
    assert effects == [
        ev.Replayed(0, A),
        ev.Replayed(2, A),
        ev.Send(B, Assign(0, (7, 0), (oracle(0, 0), oracle(0, 1)), SamplingParams(4), 5, 0)),
        ev.Send(B, Assign(2, (7, 2), (oracle(2, 0),), SamplingParams(4), 5, 0)),
    ]
    assert (list(machine.waiting), machine.replays) == ([4], 2)
    late = tokens(B, (0, 2))
    assert run(machine, late) == [ev.Deliver(0, late.tokens)]


def test_replays_wait_at_the_front_when_nobody_serves() -> None:
    machine = machine_of(max_num_seqs=2, overcommit=1.0)
    run(machine, ev.RankUp(A), *(new(i) for i in range(4)))
    run(machine, tokens(A, (1, 0)), ev.RankDown(A, "killed"))
    assert list(machine.waiting) == [1, 0, 2, 3], "in mid-answer, without a token, new"
    assert [machine.request_state(i) for i in (0, 1, 2)] == [
        RequestState.REPLAYING,
        RequestState.REPLAYING,
        RequestState.QUEUED,
    ]
    assert list(assigned(run(machine, ev.RankUp(A2))).items()) == [(1, A2), (0, A2)]


def test_a_survivor_takes_replays_only_to_their_limit() -> None:
    machine = machine_of(max_num_seqs=2, overcommit=1.0, replay_overcommit=1.5)
    run(machine, ev.RankUp(A), ev.RankUp(B), *(new(i) for i in range(4)))
    assert assigned(run(machine, ev.RankDown(A, "killed"))) == {0: B}
    assert assigned(run(machine, ev.RankUp(A2))) == {2: A2, 0: A2}


def test_tokens_of_a_former_owner_are_dropped() -> None:
    machine = machine_of()
    run(machine, ev.RankUp(A), new(0), tokens(A, (0, 0)), ev.RankDown(A, "killed"))
    assert run(machine, tokens(A, (0, 1), (0, 2))) == []
    run(machine, ev.RankUp(A2))
    assert run(machine, tokens(A, (0, 1))) == []
    assert machine.stale_tokens == 3
    again = tokens(A2, (0, 1))
    assert run(machine, again) == [ev.Deliver(0, again.tokens)]


def test_tokens_for_a_request_of_another_rank_are_dropped() -> None:
    machine = machine_of()
    run(machine, ev.RankUp(A), ev.RankUp(B), new(0), new(1))
    event = tokens(B, (0, 0), (1, 0))
    assert run(machine, event) == [ev.Deliver(1, event.tokens[1:])]
    assert machine.stale_tokens == 1


def test_duplicates_are_dropped() -> None:
    machine = machine_of()
    run(machine, ev.RankUp(A), new(0), tokens(A, (0, 0), (0, 1)))
    twice = tokens(A, (0, 1), (0, 2))
    assert run(machine, twice) == [ev.Deliver(0, twice.tokens[1:])]
    assert machine.duplicate_tokens == 1


def test_a_gap_is_a_fault_said_once() -> None:
    machine = machine_of()
    run(machine, ev.RankUp(A), new(0), new(1))
    event = tokens(A, (1, 0), (0, 1), (1, 1))
    assert run(machine, event) == [
        ev.Deliver(1, event.tokens[:1]),
        ev.Fault(A, "request 0: token 1 came before 0"),
    ]
    assert run(machine, tokens(A, (1, 1), (0, 2))) == []
    assert assigned(run(machine, new(2))) == {}
    run(machine, ev.RankUp(B))
    assert assigned(run(machine, ev.RankDown(A, "fenced"))) == {0: B, 1: B}


def test_max_tokens_finish_even_if_the_rank_does_not_say_so() -> None:
    machine = machine_of()
    run(machine, ev.RankUp(A), new(0, max_tokens=2))
    effects = run(machine, tokens(A, (0, 0), (0, 1), (0, 2)))
    deliver = effects[0]
    assert isinstance(deliver, ev.Deliver)
    assert [token.finish for token in deliver.tokens] == [None, "length"]
    assert effects[1:] == [ev.Finish(0, "length"), ev.WorkEnded()]
    assert run(machine, ev.RankDown(A, "killed")) == []


def test_what_its_first_owner_had_of_a_prompt_is_told_before_its_first_token() -> None:
    machine = machine_of()
    run(machine, ev.RankUp(A), ev.RankUp(B), new(0), new(1))
    event = replace(tokens(A, (0, 0)), cached=(Cached(0, 2), Cached(1, 2), Cached(9, 2)))
    assert run(machine, event) == [ev.FromCache(0, 2), ev.Deliver(0, event.tokens)]
    assert run(machine, event) == [], "heard twice"
    assert machine.duplicate_tokens == 1
    again = replace(tokens(B, (0, 1), (1, 0)), cached=(Cached(0, 3), Cached(1, 1)))
    effects = run(machine, ev.RankDown(A, "killed"), again)
    assert effects == [ev.FromCache(1, 1), ev.Deliver(0, again.tokens[:1]), ev.Deliver(1, again.tokens[1:])]


def test_abort_from_the_rank() -> None:
    machine = machine_of()
    effects = run(machine, ev.RankUp(A), new(0), tokens(A, (0, 0, "abort")))
    assert effects[1:] == [ev.Finish(0, "abort"), ev.WorkEnded()]


def test_what_a_rank_says_has_failed_ends_and_makes_room() -> None:
    machine = machine_of(max_num_seqs=1)
    run(machine, ev.RankUp(A), new(0), new(1), new(2), ev.RankUp(B))
    failed = ev.Failed(A, 0, FailureCode.FAILED, "why")
    held_before = dict(machine.ranks[A].requests)
    effects = run(machine, failed)
    assert ev.Finish(0, "abort", FailureCode.FAILED, "why") in effects
    assert machine.request_state(0) is None
    assert 0 in held_before
    assert 0 not in machine.ranks[A].requests
    assert run(machine, failed) == [], "it has ended"
    assert len(machine.requests) == 2


def test_a_failure_lets_the_next_one_in() -> None:
    """What nobody has room for is assigned when a request fails, at once."""
    machine = machine_of(max_num_seqs=1, max_queued=9)
    run(machine, ev.RankUp(A))
    waiting = 0
    for number in range(6):
        run(machine, new(number))
        waiting = len(machine.waiting)
    assert waiting
    first = next(iter(machine.ranks[A].requests))
    effects = run(machine, ev.Failed(A, first, FailureCode.FAILED, "why"))
    assert list(assigned(effects).values()) == [A]
    assert len(machine.waiting) == waiting - 1


def test_a_request_that_two_ranks_name_as_the_cause_of_their_end_ends() -> None:
    machine = machine_of()
    run(machine, ev.RankUp(A), new(0))
    run(machine, ev.Blamed(A, (0, 99)))
    effects = run(machine, ev.RankDown(A, "crashed"))
    assert not any(isinstance(effect, ev.Finish) for effect in effects)
    run(machine, ev.RankUp(B), ev.Blamed(B, (0,)))
    effects = run(machine, ev.RankDown(B, "crashed"))
    (finish,) = [effect for effect in effects if isinstance(effect, ev.Finish)]
    assert (finish.request_id, finish.code) == (0, FailureCode.FAILED)


def test_draining_takes_nothing_new() -> None:
    machine = machine_of()
    run(machine, ev.RankUp(A), new(0), ev.RankDraining(A), new(1))
    assert list(machine.waiting) == [1]
    assert assigned(run(machine, ev.RankUp(B))) == {1: B}
    assert machine.ranks[A].requests.keys() == {0}
    assert assigned(run(machine, ev.RankDown(A, "drained"))) == {0: B}
    assert run(machine, ev.RankDraining(A)) == []


def test_cancel_everywhere_and_too_late() -> None:
    machine = machine_of(max_num_seqs=1, overcommit=1.0)
    run(machine, ev.RankUp(A), new(0), new(1))
    assert run(machine, ev.CancelRequested(1)) == []
    assert run(machine, ev.CancelRequested(0)) == [ev.Send(A, Cancel(0)), ev.WorkEnded()]
    assert run(machine, ev.CancelRequested(0)) == []
    run(machine, new(2), ev.RankDown(A, "killed"))
    assert run(machine, ev.CancelRequested(2)) == [ev.WorkEnded()]
    assert run(machine, ev.RankUp(A2)) == []


def test_too_many_are_refused() -> None:
    machine = machine_of(max_queued=2, retry_after_s=3)
    run(machine, new(0), new(1))
    assert run(machine, new(2)) == [ev.Refuse(2, "busy", 3)]
    run(machine, ev.RankUp(A))
    assert assigned(run(machine, new(3))) == {3: A}


def test_stop_lets_the_rest_finish() -> None:
    machine = machine_of()
    run(machine, ev.RankUp(A), new(0))
    assert run(machine, ev.StopRequested()) == []
    assert run(machine, new(1)) == [ev.Refuse(1, "stopping", 1)]
    assert run(machine, tokens(A, (0, 0, "stop")))[1:] == [
        ev.Finish(0, "stop"),
        ev.WorkEnded(),
        ev.Drained(),
    ]
    assert run(machine, ev.StopRequested()) == []


def test_stop_without_work() -> None:
    assert run(machine_of(), ev.StopRequested()) == [ev.Drained()]


def test_the_deadline_fails_what_is_left() -> None:
    machine = machine_of(max_num_seqs=1, overcommit=1.0)
    run(machine, ev.RankUp(A), new(0), new(1))
    assert run(machine, ev.DeadlinePassed()) == [
        ev.Send(A, Cancel(0)),
        stopped(0),
        stopped(1),
        ev.WorkEnded(),
        ev.Drained(),
    ]


def test_a_request_that_kills_every_rank_fails_in_the_end() -> None:
    machine = machine_of(max_fruitless_replays=2)
    run(machine, new(0))
    ends = []
    for incarnation in range(1, 8):
        member = Member(0, incarnation)
        if incarnation == 2:
            run(machine, ev.RankUp(member), tokens(member, (0, 0)))
        else:
            run(machine, ev.RankUp(member))
        effects = run(machine, ev.RankDown(member, "crashed"))
        ends.append(any(isinstance(effect, ev.Finish) for effect in effects))
    assert ends == [False, False, False, False, True, False, False]


def test_a_new_incarnation_displaces_the_old_one() -> None:
    machine = machine_of()
    run(machine, ev.RankUp(A), new(0))
    assert assigned(run(machine, ev.RankUp(A2))) == {0: A2}
    assert run(machine, ev.RankDown(A, "late news")) == []
    assert machine.request_state(0) is RequestState.RUNNING


# Moves


def test_what_waits_in_a_survivor_moves_to_the_rank_that_is_back() -> None:
    machine = machine_of(max_num_seqs=2)
    run(machine, ev.RankUp(A), ev.RankUp(B), *(new(i) for i in range(4)))
    run(machine, tokens(A, (0, 0), (2, 0), (2, 1)), ev.RankDown(A, "killed"))
    assert run(machine, ev.RankUp(A2)) == [
        ev.Moved(0, B),
        ev.Send(B, Cancel(0)),
        ev.Send(A2, Assign(0, (7, 0), (oracle(0, 0),), SamplingParams(4), 5, 0)),
        ev.Moved(2, B),
        ev.Send(B, Cancel(2)),
        ev.Send(A2, Assign(2, (7, 2), (oracle(2, 0), oracle(2, 1)), SamplingParams(4), 5, 0)),
    ]
    assert (machine.moves, machine.replays, machine.request_state(0)) == (2, 2, RequestState.RUNNING)
    assert run(machine, tokens(B, (0, 1))) == []
    assert machine.stale_tokens == 1
    event = tokens(A2, (0, 1), (2, 2))
    assert run(machine, event) == [ev.Deliver(0, event.tokens[:1]), ev.Deliver(2, event.tokens[1:])]


def test_streams_in_mid_answer_move_first_then_the_longest_waiting() -> None:
    machine = machine_of(max_num_seqs=3, overcommit=1.0, replay_overcommit=2.0)
    run(machine, ev.RankUp(A), ev.RankUp(B), *(new(i) for i in range(6)))
    run(machine, tokens(A, (2, 0), (4, 0)), ev.RankDown(A, "killed"))
    assert list(machine.ranks[B].requests) == [1, 3, 5, 2, 4, 0]
    assert list(assigned(run(machine, ev.RankUp(A2)))) == [2, 4, 0]


def test_the_most_loaded_rank_gives_first() -> None:
    machine = machine_of(max_num_seqs=1, overcommit=3.0, replay_overcommit=3.0)
    run(machine, ev.RankUp(A), ev.RankUp(B), *(new(i) for i in range(6)), ev.CancelRequested(2))
    effects = run(machine, ev.RankUp(C))
    assert ev.Moved(3, B) in effects
    assert assigned(effects) == {3: C}


def test_a_stream_in_mid_answer_moves_before_new_requests_of_a_fuller_rank() -> None:
    machine = machine_of(max_num_seqs=1, overcommit=3.0, replay_overcommit=3.0)
    run(machine, ev.RankUp(A), ev.RankUp(B), *(new(i) for i in range(6)), ev.CancelRequested(4))
    assert assigned(run(machine, tokens(A, (2, 0)), ev.RankUp(C))) == {2: C}


def test_a_seat_that_became_free_is_taken() -> None:
    machine = machine_of(max_num_seqs=2, overcommit=1.5)
    run(machine, ev.RankUp(A), ev.RankUp(B), *(new(i) for i in range(6)))
    assert assigned(run(machine, tokens(A, (0, 0, "stop"), (2, 0)))) == {}
    assert assigned(run(machine, tokens(A, (2, 1, "stop")))) == {5: A}
    assert assigned(run(machine, ev.CancelRequested(5))) == {}


def test_requests_that_wait_in_a_rank_come_before_new_ones() -> None:
    machine = machine_of(max_num_seqs=1, overcommit=2.0)
    run(machine, ev.RankUp(A), *(new(i) for i in range(4)))
    assert assigned(run(machine, ev.RankUp(B))) == {1: B, 2: A, 3: B}


def test_a_draining_rank_gives_what_waits_in_it_and_gets_nothing() -> None:
    machine = machine_of(max_num_seqs=1, overcommit=2.0)
    run(machine, ev.RankUp(A), new(0), new(1), ev.RankDraining(A))
    assert assigned(run(machine, ev.RankUp(B))) == {1: B}
    run(machine, new(2), tokens(A, (0, 0, "stop")))
    assert (machine.ranks[A].requests, list(machine.ranks[B].requests)) == ({}, [1, 2])


def test_a_faulty_rank_gets_nothing() -> None:
    machine = machine_of(max_num_seqs=1, overcommit=2.0)
    run(machine, ev.RankUp(A), ev.RankUp(B), *(new(i) for i in range(4)))
    run(machine, tokens(A, (0, 1)), ev.CancelRequested(0), ev.CancelRequested(2))
    assert (machine.ranks[A].requests, list(machine.ranks[B].requests)) == ({}, [1, 3])


def returned() -> RoutingMachine:
    """Request 1 was in A, whose seat is taken, went to B, and is in A again. A's report of its first token was stale."""
    machine = machine_of(max_num_seqs=1, overcommit=2.0)
    run(machine, ev.RankUp(A), new(0), new(1), ev.RankUp(B))
    assert machine.requests[1].owner == B
    run(machine, tokens(A, (1, 0)), ev.RankDown(B, "killed"))
    assert machine.requests[1].owner == A
    return machine


def test_late_words_of_a_rank_that_has_the_request_again_are_no_gap() -> None:
    machine = returned()
    assert run(machine, tokens(A, (1, 1), (0, 0)))[0] == ev.Deliver(0, tokens(A, (0, 0)).tokens)
    assert machine.stale_tokens == 2
    event = tokens(A, (1, 0), (1, 1))
    assert run(machine, event) == [ev.Deliver(1, event.tokens)]


def test_every_rank_that_had_the_request_may_have_late_words() -> None:
    machine = machine_of(max_num_seqs=1, overcommit=2.0)
    run(machine, ev.RankUp(A), new(0), new(1), ev.RankUp(C), ev.RankUp(B), new(2), new(3))
    run(machine, tokens(C, (1, 0)), ev.RankDown(C, "killed"), ev.RankUp(Member(2, 2)))
    assert machine.requests[1].moved_from == {A, B}
    run(machine, ev.CancelRequested(3), ev.RankDraining(B), ev.RankDown(Member(2, 2), "killed"))
    assert machine.requests[1].owner == A
    assert run(machine, tokens(A, (1, 2))) == []


def test_a_gap_after_the_first_token_is_a_fault_for_those_ranks_too() -> None:
    machine = returned()
    assert run(machine, tokens(A, (1, 0), (1, 2)))[1:] == [ev.Fault(A, "request 1: token 2 came before 1")]


def test_a_request_that_moved_and_a_gap_elsewhere() -> None:
    machine = machine_of(max_num_seqs=1, overcommit=2.0)
    run(machine, ev.RankUp(A), new(0), new(1), ev.RankUp(B))
    assert run(machine, tokens(B, (1, 1))) == [ev.Fault(B, "request 1: token 1 came before 0")]


def test_a_move_is_no_loss_and_no_token() -> None:
    """Request 1 waits beside 0, moves to each new incarnation of rank 1, and dies there."""
    machine = machine_of(max_num_seqs=1, overcommit=2.0, max_fruitless_replays=4)
    run(machine, ev.RankUp(A), new(0), new(1))
    for lost in range(2):
        assert machine.requests[1].fruitless == lost
        run(machine, ev.RankUp(Member(1, lost + 1)))
        assert machine.requests[1].fruitless == lost
        run(machine, ev.RankDown(Member(1, lost + 1), "crashed"))
    run(machine, tokens(A, (1, 0)), ev.RankUp(Member(1, 3)), ev.RankDown(Member(1, 3), "crashed"))
    assert machine.requests[1].fruitless == 1


def test_a_rank_that_dies_whenever_it_is_back_fails_no_stream_of_another() -> None:
    machine = machine_of(max_num_seqs=1, overcommit=2.0, max_fruitless_replays=2)
    run(machine, ev.RankUp(A), new(0), new(1))
    for incarnation in range(1, 9):
        run(machine, ev.RankUp(Member(1, incarnation)), ev.RankDown(Member(1, incarnation), "crashed"))
    assert machine.moves == 2
    assert list(machine.ranks[A].requests) == [0, 1]


@pytest.mark.parametrize(
    "event", [ev.RankUp(A), ev.RankUp(Member(2, 3)), new(3), new(1), new(9, max_tokens=0)]
)
def test_what_nobody_must_send(event: ev.Event) -> None:
    machine = machine_of()
    run(machine, ev.RankUp(A), ev.RankDown(Member(2, 3), "died before it served"), new(3))
    with pytest.raises(UnexpectedEvent):
        machine.step(event)
    machine.check()


# Under hypothesis


@dataclass
class FakeRank:
    """Generates right tokens for what it was assigned.

    Messages lie in `inbox` until it reads them, reports in `outbox` until they are delivered.
    """

    assigned: dict[int, tuple[Assign, int]] = field(default_factory=dict)
    inbox: deque[Assign | Cancel] = field(default_factory=deque)
    outbox: deque[tuple[Token, ...]] = field(default_factory=deque)

    def read(self, count: int) -> None:
        for message in [self.inbox.popleft() for _ in range(min(count, len(self.inbox)))]:
            if isinstance(message, Assign):
                assert message.request_id not in self.assigned
                self.assigned[message.request_id] = message, len(message.emitted)
            else:
                self.assigned.pop(message.request_id, None)

    def will_have(self) -> set[int]:
        """What it is to run when it has read everything."""
        ids = set(self.assigned)
        for message in self.inbox:
            (ids.add if isinstance(message, Assign) else ids.discard)(message.request_id)
        return ids

    def compute(self, count: int) -> None:
        """One report with `count` tokens of each request, fewer where one ends."""
        report = []
        for request_id, (message, index) in list(self.assigned.items()):
            for position in range(index, min(index + count, message.params.max_tokens)):
                last = position == message.params.max_tokens - 1
                report.append(
                    Token(request_id, position, oracle(request_id, position), "length" if last else None)
                )
                if last:
                    del self.assigned[request_id]
                else:
                    self.assigned[request_id] = message, position + 1
        if report:
            self.outbox.append(tuple(report))


RANKS = st.integers(0, 2)
PROMPTS = st.builds(
    lambda first, alike, last: [first] * alike + last,
    st.integers(0, 1),
    st.integers(1, 9),
    st.lists(st.integers(0, 1), max_size=4),
)
"""Most begin alike, so far."""
PAGE = 2


class RoutingUnderFaults(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.fakes: dict[Member, FakeRank] = defaultdict(FakeRank)
        self.up: dict[int, Member] = {}
        self.draining: set[Member] = set()
        self.incarnations = [0, 0, 0]
        self.submitted = 0
        self.wanted: dict[int, int] = {}
        self.wants: dict[int, int] = {}
        self.heard: dict[int, list[int]] = defaultdict(list)
        self.finished: set[int] = set()
        self.owners: dict[int, Member] = {}
        self.moving: int | None = None
        self.working = False
        self.marks = MarkNumbers()
        self.prompts: dict[int, list[int]] = {}
        self.had_a_rank: set[int] = set()
        self.given: dict[Member, set[tuple[int, ...]]] = defaultdict(set)
        """Beginnings, of full pages."""
        self.held: dict[Member, tuple[int, ...]] = {}
        self.moves = 0

    @initialize(seats=st.integers(1, 6), pages=st.sampled_from([0, 9, 15, 30]))
    def start(self, seats: int, pages: int) -> None:
        self.seats, self.pages = seats, pages
        self.config = ev.RoutingConfig(
            seats, max_queued=6, max_fruitless_replays=10**6, num_pages=pages, page_size=PAGE, least_shared=2
        )
        self.machine = RoutingMachine(self.config)
        self.launch(0)

    def feed(self, event: ev.Event) -> None:
        for effect in self.machine.step(event):
            match effect:
                case ev.Send(member, message):
                    assert self.up.get(member.rank) == member, f"sent to {member}, which is down"
                    if isinstance(message, Assign):
                        assert member not in self.draining
                        assert list(message.emitted) == self.heard[message.request_id]
                        assert message.request_id not in self.owners
                        if message.request_id == self.moving:
                            assert self.load(member) < self.seats
                            assert self.has_room(member, message.request_id)
                            self.moving = None
                        if message.request_id not in self.had_a_rank:
                            self.check_beginning(message.request_id, member)
                        self.had_a_rank.add(message.request_id)
                        self.given[member] |= self.beginnings(message.request_id)
                        self.owners[message.request_id] = member
                    else:
                        assert self.owners.pop(message.request_id) == member
                    self.fakes[member].inbox.append(message)
                case ev.Moved(request_id, member):
                    assert self.owners[request_id] == member
                    assert self.load(member) > self.seats or request_id in self.held.get(member, ())
                    self.moving = request_id
                    self.moves += 1
                case ev.Deliver(request_id, batch):
                    assert request_id not in self.finished
                    for token in batch:
                        assert token.index == len(self.heard[request_id])
                        self.heard[request_id].append(token.token)
                case ev.Finish(request_id, reason):
                    assert reason == "length"
                    assert request_id not in self.finished
                    self.finished.add(request_id)
                    del self.owners[request_id]
                case ev.Replayed(request_id, member):
                    assert self.owners.pop(request_id) == member
                case ev.Refuse(request_id):
                    del self.wanted[request_id]
                case ev.WorkBegan():
                    assert not self.working
                    self.working = True
                case ev.WorkEnded():
                    assert self.working
                    self.working = False
                case ev.Fault():
                    raise AssertionError(effect)

    def load(self, member: Member) -> int:
        return sum(owner == member for owner in self.owners.values())

    # What is promised, page by page

    def beginnings(self, request_id: int) -> set[tuple[int, ...]]:
        prompt = self.prompts[request_id]
        return {tuple(prompt[:end]) for end in range(PAGE, len(prompt) + 1, PAGE)}

    def promised(self, member: Member, *others: int) -> int:
        pages: set[object] = set()
        for request_id in [*(r for r, owner in self.owners.items() if owner == member), *others]:
            shared, tokens = (
                self.beginnings(request_id),
                len(self.prompts[request_id]) + self.wants[request_id],
            )
            pages |= shared | {(-1, request_id, place) for place in range(-(-tokens // PAGE) - len(shared))}
        return len(pages)

    def has_room(self, member: Member, request_id: int) -> bool:
        return not self.load(member) or not self.pages or self.promised(member, request_id) <= self.pages

    def share(self, member: Member) -> float:
        pages = self.promised(member) / self.pages if self.pages else 0
        return max(self.load(member) / self.seats, pages)

    def check_beginning(self, request_id: int, chosen: Member) -> None:
        """A new request is with a rank that has the longest beginning, of those that have room and not too much to do."""
        roomy = [
            member
            for member in self.up.values()
            if member not in self.draining
            and self.load(member) < self.seats
            and self.has_room(member, request_id)
        ]
        if roomy:
            assert chosen in roomy
            most = min(map(self.share, roomy)) + self.config.tolerance
            having = {
                member: len(self.given[member] & self.beginnings(request_id))
                for member in roomy
                if self.share(member) <= most
            }
            assert having[chosen] == max(having.values()) or max(having.values()) < self.config.least_shared

    @rule(asked=st.lists(st.tuples(PROMPTS, st.integers(1, 6)), min_size=1, max_size=4))
    def submit(self, asked: list[tuple[list[int], int]]) -> None:
        for prompt, max_tokens in asked:
            request_id = self.submitted
            self.wanted[request_id] = self.wants[request_id] = max_tokens
            self.prompts[request_id] = prompt
            self.submitted += 1
            marks = self.marks.of(beginnings(prompt, PAGE))
            request = ev.NewRequest(request_id, tuple(prompt), SamplingParams(max_tokens), 5, 0, marks)
            self.feed(ev.Submitted(request))

    @rule(rank=RANKS, data=st.data())
    def hold(self, rank: int, data: st.DataObject) -> None:
        """The rank says who waits in it: any of those that it has, for all that the machine knows."""
        if rank in self.up:
            member = self.up[rank]
            has = sorted(r for r, owner in self.owners.items() if owner == member)
            self.held[member] = tuple(data.draw(st.lists(st.sampled_from(has), unique=True)) if has else ())
            self.feed(ev.TokensCommitted(member, (), held=self.held[member]))

    @rule()
    def nothing_moves_to_and_fro(self) -> None:
        """Ranks repeat themselves, and hold all that they get: moves come to an end."""
        for _ in range(20):
            before = self.moves
            for member in self.up.values():
                owned = tuple(r for r, owner in self.owners.items() if owner == member)
                self.held[member] = tuple({*self.held.get(member, ())} & {*owned})
                self.feed(ev.TokensCommitted(member, (), held=self.held[member]))
            if self.moves == before:
                return
        raise AssertionError("to and fro")

    @rule(rank=RANKS)
    def launch(self, rank: int) -> None:
        if rank not in self.up:
            self.incarnations[rank] += 1
            self.up[rank] = Member(rank, self.incarnations[rank])
            self.feed(ev.RankUp(self.up[rank]))

    @rule(rank=RANKS, read=st.integers(0, 4), counts=st.lists(st.integers(1, 3), min_size=1, max_size=3))
    def compute(self, rank: int, read: int, counts: list[int]) -> None:
        if rank in self.up:
            self.fakes[self.up[rank]].read(read)
            for count in counts:
                self.fakes[self.up[rank]].compute(count)

    @rule(rank=RANKS, again=st.booleans())
    def deliver(self, rank: int, again: bool) -> None:
        """Also a second time: a link that repeats itself does no harm."""
        fake = self.fakes[self.up[rank]] if rank in self.up else None
        if fake is not None and fake.outbox:
            report = fake.outbox[0] if again else fake.outbox.popleft()
            self.feed(ev.TokensCommitted(self.up[rank], report))

    @rule(rank=RANKS)
    def kill(self, rank: int) -> None:
        if rank in self.up:
            self.feed(ev.RankDown(self.up.pop(rank), "killed"))

    @rule(rank=RANKS)
    def brief_life(self, rank: int) -> None:
        """What moved to it is soon where it was, and words of before come meanwhile and after that."""
        others = list(self.up)
        if rank not in others:
            for other in others:
                self.compute(other, read=9, counts=[1, 1])
            self.launch(rank)
            for other in others:
                self.deliver(other, again=False)
            self.kill(rank)
            for other in others:
                self.deliver(other, again=False)

    @rule(rank=RANKS)
    def drain(self, rank: int) -> None:
        if rank in self.up:
            self.draining.add(self.up[rank])
            self.feed(ev.RankDraining(self.up[rank]))

    @rule(rank=RANKS, left=st.booleans())
    def after_draining(self, rank: int, left: bool) -> None:
        """It leaves with what it has, or goes on."""
        member = self.up.get(rank)
        if member is None or member not in self.draining:
            return
        self.draining.discard(member)
        if left:
            fruitless = {each: request.fruitless for each, request in self.machine.requests.items()}
            self.feed(ev.RankDown(self.up.pop(rank), "as asked", left=True))
            assert all(
                self.machine.requests[each].fruitless <= fruitless[each] for each in self.machine.requests
            )
        else:
            self.feed(ev.RankResumed(member))

    @precondition(lambda self: self.fakes)
    @rule(data=st.data())
    def late_words_of_the_dead(self, data: st.DataObject) -> None:
        dead = [m for m, fake in self.fakes.items() if fake.outbox and self.up.get(m.rank) != m]
        if dead:
            member = data.draw(st.sampled_from(sorted(dead)))
            self.feed(ev.TokensCommitted(member, self.fakes[member].outbox.popleft()))

    @precondition(lambda self: self.submitted)
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        request_id = data.draw(st.integers(0, self.submitted - 1))
        if request_id not in self.finished:
            self.wanted.pop(request_id, None)
        self.feed(ev.CancelRequested(request_id))

    @invariant()
    def consistent(self) -> None:
        self.machine.check()
        assert self.working == bool(self.machine.requests)
        for member, rank in self.machine.ranks.items():
            # Old words of a rank that has a request again may end it before the rank comes to its end once more.
            assert rank.requests.keys() | self.finished >= self.fakes[member].will_have()

    @invariant()
    def nobody_waits_beside_a_free_seat(self) -> None:
        """But for want of pages, where they are counted, or where others wait already."""
        loads = {member: self.load(member) for member in self.up.values()}
        free = [
            member
            for member in loads
            if loads[member] < self.seats
            and member not in self.draining
            and not (self.pages and loads[member])
            and not any(self.owners.get(held) == member for held in self.held.get(member, ()))
        ]
        assert not free or max(loads.values()) <= self.seats

    @invariant()
    def pages_are_counted_once(self) -> None:
        for member, rank in self.machine.ranks.items():
            assert rank.pages == self.promised(member)

    def teardown(self) -> None:
        """With one healthy rank everything ends, and whoever did not cancel has the full sequence."""
        for rank in list(self.up):
            self.kill(rank)
        self.launch(0)
        while self.machine.requests:
            fake = self.fakes[self.up[0]]
            fake.read(len(fake.inbox))
            fake.compute(3)
            assert fake.outbox, "requests are left, but the rank has nothing to do"
            self.deliver(0, again=False)
            self.machine.check()
        for request_id, max_tokens in self.wanted.items():
            assert request_id in self.finished
            assert self.heard[request_id] == [oracle(request_id, i) for i in range(max_tokens)]


RoutingUnderFaults.TestCase.settings = settings(
    max_examples=150, stateful_step_count=60, deadline=None, derandomize=True
)
test_routing_under_faults = RoutingUnderFaults.TestCase
