"""Marks of prompts: which beginnings are told apart, what is remembered of whom, and for how long."""

from __future__ import annotations

from collections import OrderedDict
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_ep.machines.requests.prefixes import DEPTHS, MarkNumbers, Prefixes, beginnings, marks_of

MOST_TOKENS = 1 << 20


def test_the_longest_prompt_has_few_marks_and_no_two_are_far_apart() -> None:
    assert len(DEPTHS) == 60
    assert DEPTHS[:9] == (1, 2, 3, 4, 5, 6, 7, 8, 10)
    assert DEPTHS[-1] == MOST_TOKENS // 16
    for depth, deeper in pairwise(DEPTHS):
        assert depth < deeper <= max(depth + 1, depth * 1.25)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 4),
    st.lists(st.integers(0, 2), max_size=90),
    st.lists(st.integers(0, 2), max_size=90),
    st.data(),
)
def test_prompts_share_as_many_marks_as_they_begin_alike(
    page_size: int, one: list[int], other: list[int], data: st.DataObject
) -> None:
    other = one[: data.draw(st.integers(0, len(one)))] + other
    found, others = beginnings(one, page_size), beginnings(other, page_size)
    assert (
        len(found) == marks_of(len(one), page_size) == sum(depth * page_size <= len(one) for depth in DEPTHS)
    )
    for index, depth in enumerate(DEPTHS[: min(len(found), len(others))]):
        alike = one[: depth * page_size] == other[: depth * page_size]
        assert (found[index] == others[index]) == alike


def test_a_mark_is_a_number_as_long_as_it_is_remembered() -> None:
    numbers = MarkNumbers(3)
    assert numbers.of((b"a", b"ab")) == (0, 1)
    assert numbers.of((b"a", b"ac")) == (0, 2)
    assert numbers.of((b"b",)) == (3,)  # ab, which was not met for longest, is forgotten
    assert numbers.of((b"a", b"ac")) == (0, 2)
    assert numbers.of((b"a", b"ab")) == (0, 4)


CALLS: st.SearchStrategy[tuple[str, list[int], int]] = st.one_of(
    st.tuples(st.just("give"), st.lists(st.integers(0, 9), max_size=5, unique=True), st.integers(0, 3)),
    st.tuples(st.just("forget"), st.just([]), st.integers(0, 3)),
)


@settings(max_examples=300, deadline=None)
@given(
    st.lists(CALLS, max_size=30),
    st.lists(st.integers(0, 9), max_size=6, unique=True),
    st.sets(st.integers(0, 3)),
)
def test_the_ranks_with_the_longest_beginning_are_found(
    calls: list[tuple[str, list[int], int]], marks: list[int], asked: set[int]
) -> None:
    """Against a list of what was given, newest last; of a prompt the first mark counts as given last."""
    prefixes, given_marks = Prefixes(most=6), OrderedDict[int, set[int]]()
    for what, of, rank in calls:
        if what == "give":
            prefixes.give(of, rank)
            for mark in reversed(of):
                given_marks.setdefault(mark, set()).add(rank)
                given_marks.move_to_end(mark)
            while len(given_marks) > 6:
                given_marks.popitem(last=False)
        else:
            prefixes.forget(rank)
            for having in given_marks.values():
                having.discard(rank)
            given_marks = OrderedDict((mark, having) for mark, having in given_marks.items() if having)
    assert prefixes.given_to == {
        mark: sum(1 << rank for rank in having) for mark, having in given_marks.items()
    }

    def length(rank: int) -> int:
        return next((i for i, mark in enumerate(marks) if rank not in given_marks.get(mark, ())), len(marks))

    longest = max(map(length, asked), default=0)
    bits = sum(1 << rank for rank in asked)
    best = sum(1 << rank for rank in asked if length(rank) == longest)
    for least in (1, 3):
        assert prefixes.best(marks, bits, least) == (best if longest >= least else bits)
