"""Exactly the bad ones are found, whatever the batch, in few steps, and nobody else loses anything."""

from __future__ import annotations

import itertools
from math import ceil, log2

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_ep.machines.rank.bisection import Bisection

EXHAUSTIVE = 11
"""Batches up to this size are tried with every set of bad items."""


def bound(size: int, bad: int) -> int:
    """Steps beyond the first: each bad item is a path in a tree of halves, and each node of it has one sibling."""
    return 2 * bad * ceil(log2(size)) if size > 1 else 0


def find(size: int, bad: frozenset[int]) -> tuple[set[int], int]:
    """Who is found, and how many steps it took after the first. Every good item has run just once in the end."""
    bisection: Bisection[int] = Bisection()
    batch, steps = list(range(size)), 0
    found: set[int] = set()
    ran: list[int] = []
    while batch:
        if bad & set(batch):
            culprit = bisection.failed(batch)
            if culprit is not None:
                found.add(culprit)
        else:
            ran += batch
        bisection.check()
        batch = bisection.take()
        steps += bool(batch)
    assert sorted(ran) == sorted(set(range(size)) - bad)
    return found, steps


@pytest.mark.parametrize("size", range(1, EXHAUSTIVE + 1))
def test_every_set_of_bad_items_of_every_small_batch(size: int) -> None:
    for count in range(size + 1):
        for bad in itertools.combinations(range(size), count):
            found, steps = find(size, frozenset(bad))
            assert found == set(bad)
            assert steps <= bound(size, count)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 256), st.data())
def test_large_batches(size: int, data: st.DataObject) -> None:
    bad = data.draw(st.frozensets(st.integers(0, size - 1), max_size=8))
    found, steps = find(size, bad)
    assert found == bad
    assert steps <= bound(size, len(bad))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 24), st.data())
def test_whatever_comes_between(size: int, data: st.DataObject) -> None:
    """Steps that do not count, and items that are cancelled: none is lost, run twice, or blamed for another."""
    bad = data.draw(st.frozensets(st.integers(0, size - 1)))
    bisection: Bisection[int] = Bisection()
    bisection.again(range(size))
    gone: set[int] = set()
    ended: list[int] = []
    while batch := bisection.take():
        happens = data.draw(st.sampled_from(["counts", "counts", "does not", "cancel"]))
        if happens == "cancel":
            item = data.draw(st.integers(0, size - 1))
            bisection.again(batch)
            bisection.forget(lambda one, item=item: one == item)  # type: ignore[misc]  # bound now
            if item not in ended:
                gone.add(item)
        elif happens == "does not":
            bisection.again(batch)
        elif bad & set(batch):
            culprit = bisection.failed(batch)
            if culprit is not None:
                assert culprit in bad
                ended.append(culprit)
        else:
            ended += batch
        bisection.check()
    assert sorted(ended) == sorted(set(range(size)) - gone)
