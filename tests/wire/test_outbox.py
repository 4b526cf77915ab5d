"""No turn of the event loop encodes much, no rank hears things in another order, nothing is lost."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from elastic_ep.wire.messages import Assign, Cancel, Drain, Member, SamplingParams, ToRank
from elastic_ep.wire.outbox import A_TURN, LONG, Outbox, cost

MEMBERS = [Member(0, 1), Member(1, 1), Member(1, 2)]
LENGTHS = (1, LONG - 1, LONG, A_TURN // 2, A_TURN - 1, A_TURN, 3 * A_TURN)


class Loop:
    """One turn after the other, and what was sent in each."""

    def __init__(self) -> None:
        self.due: list[Callable[[], None]] = []
        self.turns: list[list[tuple[Member, ToRank]]] = [[]]

    def later(self, call: Callable[[], None]) -> None:
        self.due.append(call)

    def send(self, member: Member, message: ToRank) -> None:
        self.turns[-1].append((member, message))

    def turn(self) -> None:
        self.turns.append([])
        due, self.due = self.due, []
        for call in due:
            call()


def assign(number: int, tokens: int) -> Assign:
    return Assign(number, (7,) * (tokens - tokens // 3), (7,) * (tokens // 3), SamplingParams(1), 0, 0)


STEPS = st.lists(
    st.tuples(st.sampled_from(MEMBERS), st.sampled_from(LENGTHS) | st.sampled_from(["cancel", "drain"]))
    | st.just("turn"),
    max_size=40,
)


@given(STEPS)
def test_order_bound_and_nothing_lost(steps: list[tuple[Member, int | str] | str]) -> None:
    loop = Loop()
    outbox = Outbox(loop.send, loop.later)
    put: list[tuple[Member, ToRank]] = []
    for number, step in enumerate(steps):
        if isinstance(step, str):
            loop.turn()
            continue
        member, what = step
        message: ToRank
        if isinstance(what, int):
            message = assign(number, what)
        else:
            over = {m.request_id for _, m in put if isinstance(m, Cancel)}
            given = [m.request_id for to, m in put if to == member and isinstance(m, Assign)]
            left = [request_id for request_id in given if request_id not in over]
            message = Cancel(left[number % len(left)]) if what == "cancel" and left else Drain()
        put.append((member, message))
        outbox.put(member, message)
    while loop.due:
        loop.turn()
    sent = [one for turn in loop.turns for one in turn]
    for member in MEMBERS:
        heard = [message for to, message in sent if to == member]
        meant = [message for to, message in put if to == member]
        cancelled = {m.request_id for m in meant if isinstance(m, Cancel)}
        unheard = [message for message in meant if message not in heard]
        assert all(isinstance(m, (Assign, Cancel)) and m.request_id in cancelled for m in unheard)
        assert heard == [message for message in meant if message in heard]
    for turn in loop.turns:
        assert sum(cost(message) for _, message in turn[:-1]) < A_TURN


def test_a_short_message_goes_at_once_also_beside_a_long_one() -> None:
    loop = Loop()
    outbox = Outbox(loop.send, loop.later)
    first, long = assign(1, 10), assign(2, A_TURN)
    outbox.put(MEMBERS[0], first)
    outbox.put(MEMBERS[1], long)
    outbox.put(MEMBERS[0], Drain())
    assert loop.turns == [[(MEMBERS[0], first), (MEMBERS[0], Drain())]]
    loop.turn()
    assert loop.turns[-1] == [(MEMBERS[1], long)]


def test_of_very_many_short_messages_a_turn_sends_some() -> None:
    """A rank is lost, and what waited in it goes to another."""
    loop = Loop()
    outbox = Outbox(loop.send, loop.later)
    put = [assign(number, 10) for number in range(1000)]
    for message in put:
        outbox.put(MEMBERS[0], message)
    while loop.due:
        loop.turn()
    assert [message for turn in loop.turns for _, message in turn] == put
    assert max(map(len, loop.turns)) <= A_TURN // cost(put[0]) + 1


def test_a_request_that_is_cancelled_before_it_went_out_never_does() -> None:
    loop = Loop()
    outbox = Outbox(loop.send, loop.later)
    for number in range(3):
        outbox.put(MEMBERS[0], assign(number, LONG))
    outbox.put(MEMBERS[0], Cancel(1))
    outbox.put(MEMBERS[0], Cancel(9))
    loop.turn()
    assert [m for _, m in loop.turns[-1]] == [assign(0, LONG), assign(2, LONG), Cancel(9)]


def test_ranks_take_turns() -> None:
    loop = Loop()
    outbox = Outbox(loop.send, loop.later)
    for number in range(6):
        outbox.put(MEMBERS[number // 3], assign(number, A_TURN))
    while loop.due:
        loop.turn()
    assert [member.rank for turn in loop.turns for member, _ in turn] == [0, 1, 0, 1, 0, 1]
