"""Which rank a request goes to: by the beginning of its prompt, within bounds, by pages as by seats."""

from __future__ import annotations

from dataclasses import replace

import pytest

from elastic_ep.machines.contract import UnexpectedEvent
from elastic_ep.machines.requests import events as ev
from elastic_ep.machines.requests.prefixes import DEPTHS, marks_of
from elastic_ep.machines.requests.records import HORIZON
from elastic_ep.machines.requests.routing import RoutingMachine
from elastic_ep.wire.messages import Member, SamplingParams
from tests.machines.test_routing import A2, A, B, C, assigned, run, tokens

PAGE = 4
LONGEST = 4000


def machine_of(
    seats: int = 16, num_pages: int = 100, max_queued: int = 1024, least_shared: int = 1
) -> RoutingMachine:
    return RoutingMachine(
        ev.RoutingConfig(
            seats,
            max_queued,
            num_pages=num_pages,
            page_size=PAGE,
            max_model_len=LONGEST,
            least_shared=least_shared,
        )
    )


def asked(number: int, pages: int, *marks: int, new: int = 1) -> ev.Submitted:
    """A prompt of so many full pages and a token. `marks` are the first of it; the others are its own."""
    own = range(1000 * (number + 1), 2000 * (number + 1))
    all_marks = [*marks, *own][: marks_of(pages * PAGE, PAGE)]
    prompt = (7,) * (pages * PAGE + 1)
    return ev.Submitted(ev.NewRequest(number, prompt, SamplingParams(new), 5, 0, tuple(all_marks)))


def held(member: Member, *numbers: int) -> ev.TokensCommitted:
    return ev.TokensCommitted(member, (), held=numbers)


def owner(machine: RoutingMachine, number: int) -> Member | None:
    return machine.requests[number].owner


# The beginning of a prompt


def test_a_request_goes_to_the_rank_that_has_the_longest_beginning_of_its_prompt() -> None:
    machine = machine_of()
    run(machine, ev.RankUp(A), ev.RankUp(B), ev.RankUp(C))
    run(
        machine, asked(0, 4, 1, 2, 3, 4), asked(1, 4, 1, 2, 30, 40, new=9), ev.CancelRequested(0), asked(2, 1)
    )
    first, second, third = A, A, B
    assert [owner(machine, 1), owner(machine, 2)] == [second, third]
    assert assigned(run(machine, asked(3, 4, 1, 2, 3, 5))) == {3: first}
    assert assigned(run(machine, asked(4, 4, 100, 200))) == {4: C}, "of nobody's, the least loaded"


def test_a_request_goes_where_there_is_room_for_all_that_it_wants_from_the_first() -> None:
    """Beside the other of the same beginning it would need 81 + 21 pages."""
    machine = machine_of(num_pages=100)
    run(machine, ev.RankUp(A), ev.RankUp(B))
    assert assigned(run(machine, asked(0, 4, 1, 2, 3, 4, new=304))) == {0: A}
    assert assigned(run(machine, asked(1, 4, new=264))) == {1: B}
    assert assigned(run(machine, asked(2, 4, 1, 2, 3, 4, new=80))) == {2: B}


def test_a_beginning_that_is_computed_in_a_step_or_two_is_no_reason() -> None:
    machine = machine_of(least_shared=8)
    run(machine, ev.RankUp(A), ev.RankUp(B))
    to = [
        next(iter(assigned(run(machine, asked(number, 9, *range(1, shared + 1)))).values()))
        for number, shared in enumerate((7, 7, 8, 8))
    ]
    assert to == [A, B, A, A]


def test_not_if_it_is_loaded_by_more_than_a_quarter_more_than_the_least() -> None:
    machine = machine_of(seats=32, num_pages=10_000)
    run(machine, ev.RankUp(A), ev.RankUp(B))
    for number in range(9):
        assert assigned(run(machine, asked(number, 2, 1, 2))) == {number: A}
    assert assigned(run(machine, asked(9, 2, 1, 2))) == {9: B}, "9 of 32 to none"
    assert assigned(run(machine, asked(10, 2, 1, 2))) == {10: B}, "which has it now, too"


def test_nor_by_more_than_four_requests_of_few_seats_nor_without_a_free_seat() -> None:
    machine = machine_of(seats=8)
    run(machine, ev.RankUp(A), ev.RankUp(B))
    to = [next(iter(assigned(run(machine, asked(number, 2, 1, 2))).values())) for number in range(7)]
    assert to == [A, A, A, A, A, B, B]
    machine = machine_of(seats=2)
    run(machine, ev.RankUp(A), ev.RankUp(B))
    to = [next(iter(assigned(run(machine, asked(number, 2, 1, 2))).values())) for number in range(4)]
    assert to == [A, A, B, B]


@pytest.mark.parametrize(("pages", "to"), [(13, A), (14, B)])
def test_not_for_its_beginning_to_a_rank_without_room_for_the_rest(pages: int, to: Member) -> None:
    """A has 11 pages left, and the first three; B, which is loaded less, has 19."""
    machine = machine_of(num_pages=44)
    run(machine, ev.RankUp(A), asked(0, 32, 1, 2, 3), ev.RankUp(B), asked(1, 24))
    assert [machine.ranks[member].pages for member in (A, B)] == [33, 25]
    assert assigned(run(machine, asked(2, pages, 1, 2, 3))) == {2: to}
    assert machine.ranks[A].pages <= 44


def test_the_next_incarnation_has_nothing_and_no_mark_is_lost_meanwhile() -> None:
    machine = machine_of()
    run(machine, ev.RankUp(A), ev.RankUp(B), asked(0, 4, 1, 2, 3, 4, new=9))
    effects = run(machine, tokens(A, (0, 0)), ev.RankDown(A, "killed"))
    assert assigned(effects) == {0: B}
    run(machine, ev.RankUp(A2), asked(1, 1))
    assert owner(machine, 1) == A2
    assert assigned(run(machine, asked(2, 4, 1, 2, 3, 4))) == {2: B}, "where it went on"


def test_streams_that_were_cut_off_are_spread_whatever_they_begin_with() -> None:
    machine = machine_of(num_pages=1000)
    run(machine, ev.RankUp(A), *(asked(number, 8, 1, 2, 3, 4, new=9) for number in range(6)))
    run(machine, *(tokens(A, (number, 0)) for number in range(6)))
    run(machine, ev.RankUp(B), ev.RankUp(C))
    effects = run(machine, ev.RankDown(A, "killed"))
    assert sorted(assigned(effects).values()) == [B, B, B, C, C, C]


@pytest.mark.parametrize("marks", [(1,), (1, 2, 3)])
def test_marks_that_such_a_prompt_cannot_have_are_refused(marks: tuple[int, ...]) -> None:
    request = replace(asked(0, 2).request, marks=marks)
    with pytest.raises(UnexpectedEvent, match="marks"):
        run(machine_of(), ev.Submitted(request))


# Pages


def test_long_streams_of_a_lost_rank_are_spread_by_pages() -> None:
    """B has one request of half its pages, C eight of few: what A had goes to C, until that has as much."""
    machine = machine_of(seats=64, num_pages=400)
    run(machine, ev.RankUp(B), asked(0, 199, new=9), ev.RankUp(C))
    run(machine, *(asked(number, 2, new=9) for number in range(1, 9)), ev.RankDraining(B), ev.RankDraining(C))
    assert [machine.ranks[member].pages for member in (B, C)] == [202, 8 * 5]
    run(machine, ev.RankUp(A), *(asked(number, 50, new=9) for number in range(9, 16)))
    assert list(machine.ranks[A].requests) == list(range(9, 16))
    for member in (B, C):
        machine.ranks[member].accepting = True
    to = assigned(run(machine, ev.RankDown(A, "killed")))
    assert list(to.values()) == [C, C, C, C, B, C, B]


def test_an_answer_without_a_limit_is_promised_so_many_tokens_ahead() -> None:
    machine = machine_of(num_pages=2000)
    run(machine, ev.RankUp(A), asked(0, 10, new=LONGEST))
    assert machine.ranks[A].pages == -(-(41 + HORIZON) // PAGE)
    for index in range(HORIZON // 2 + 1):
        run(machine, tokens(A, (0, index)))
    assert machine.ranks[A].pages == -(-(41 + HORIZON // 2 + 1 + HORIZON) // PAGE)
    run(machine, ev.CancelRequested(0))
    assert machine.ranks[A].pages == 0


def test_a_rank_says_how_many_pages_it_has() -> None:
    machine = machine_of(num_pages=100)
    run(machine, ev.RankUp(A, 1000), ev.RankUp(B))
    assert [machine.ranks[member].num_pages for member in (A, B)] == [1000, 100]
    run(machine, asked(0, 50), asked(1, 50))
    assert [owner(machine, 0), owner(machine, 1)] == [A, B]
    assert assigned(run(machine, asked(2, 50))) == {2: A}, "a twentieth beside a half"


def test_what_waits_for_pages_moves_to_the_rank_that_is_back() -> None:
    """There are seats enough. Streams in mid-answer first; as many as there is room for."""
    machine = machine_of(num_pages=100)
    run(machine, ev.RankUp(A), ev.RankUp(B), *(asked(number, 30, new=9) for number in range(6)))
    run(machine, tokens(A, (4, 0)), tokens(B, (1, 0), (3, 0), (5, 0)))
    run(machine, ev.RankDown(A, "killed"))
    assert list(machine.ranks[B].requests) == [1, 3, 5, 4, 0, 2]
    assert run(machine, held(B, 4, 0, 2)) == []
    effects = run(machine, ev.RankUp(A2))
    assert [effect.request_id for effect in effects if isinstance(effect, ev.Moved)] == [4, 0, 2]
    assert assigned(effects) == {4: A2, 0: A2, 2: A2}
    assert run(machine, held(B)) == run(machine, held(A2, 2)) == [], "it does not go back"


def test_it_does_not_move_where_others_wait_until_they_do_not() -> None:
    machine = machine_of(num_pages=100)
    run(machine, ev.RankUp(A), *(asked(number, 30, new=9) for number in range(4)), held(A, 3))
    run(machine, ev.RankUp(B), asked(4, 1, new=9))
    assert owner(machine, 4) == B
    assert owner(machine, 3) == B, "it moved when B came"
    machine = machine_of(num_pages=100)
    run(machine, ev.RankUp(A), *(asked(number, 30, new=9) for number in range(4)))
    run(machine, ev.RankUp(B), asked(4, 1, new=9), held(B, 4))
    assert run(machine, held(A, 3)) == []
    assert assigned(run(machine, held(B))) == {3: B}


def test_what_waits_for_its_turn_stays_with_the_rank_that_has_its_beginning() -> None:
    """Four long prompts that begin alike came at once: three wait as the first is computed."""
    machine = machine_of(num_pages=1000)
    run(machine, ev.RankUp(A), ev.RankUp(B), *(asked(number, 40, 1, 2, 3) for number in range(4)))
    assert run(machine, held(A, 1, 2, 3)) == []
    assert len(machine.ranks[A].requests) == 4


def test_what_is_held_no_more_or_elsewhere_does_not_move() -> None:
    machine = machine_of(num_pages=100)
    run(machine, ev.RankUp(A), *(asked(number, 30, new=9) for number in range(4)))
    run(machine, held(A, 3, 99), held(A), ev.RankUp(B))
    assert len(machine.ranks[A].requests) == 4


def test_pages_that_are_not_counted_bound_nothing() -> None:
    machine = machine_of(num_pages=0)
    run(machine, ev.RankUp(A), ev.RankUp(B), *(asked(number, 900) for number in range(32)))
    assert [len(rank.requests) for rank in machine.ranks.values()] == [16, 16]


def test_every_mark_counts_the_pages_since_the_one_before() -> None:
    machine = machine_of(num_pages=10_000)
    run(machine, ev.RankUp(A), asked(0, 100, *range(1, 17)), asked(1, 100, *range(1, 17)))
    assert machine.ranks[A].pages == 2 * 101 - DEPTHS[15]
    run(machine, ev.CancelRequested(0))
    assert machine.ranks[A].pages == 101


def test_who_gave_what_waited_in_it_may_have_room_for_what_was_to_be_moved_before() -> None:
    """R has no room for a stream that waits for a seat in A; B has, as it begins alike, but requests wait there."""
    machine = machine_of()
    alike = tuple(range(1, 1 + marks_of(40 * PAGE, PAGE)))
    run(
        machine,
        ev.RankUp(B),
        asked(0, 74, *alike, new=3),
        asked(1, 29, new=3),
        ev.RankUp(C),
        asked(2, 44, new=3),
    )
    assert [machine.ranks[member].pages for member in (B, C)] == [75 + 30, 45]
    for member in (B, C):
        machine.ranks[member].accepting = False
    run(machine, ev.RankUp(A), *(asked(number, 0, new=3) for number in range(3, 19)))
    run(machine, asked(19, 59, *alike, new=3), tokens(A, (19, 0)))
    for member in (B, C):
        machine.ranks[member].accepting = True
    assert assigned(run(machine, held(B, 1))) == {1: C, 19: B}


def test_who_waited_for_a_seat_stays_when_another_that_waits_has_gone() -> None:
    """Five seats: the sixth waits for one, another for pages. When that has moved, the sixth has a seat."""
    machine = machine_of(seats=5)
    run(machine, ev.RankUp(A), *(asked(number, 30, new=3) for number in range(6)))
    run(machine, tokens(A, (1, 0)), held(A, 1))
    assert assigned(run(machine, ev.RankUp(B))) == {1: B}
    assert list(machine.ranks[A].requests) == [0, 2, 3, 4, 5]
