"""Chunks of prompts against made-up devices: decodes keep their pace, and prompts get what that leaves."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_ep.engine.prompt_pace import PromptPace

STRETCH = 2.0
FLOOR, CAPACITY = 64, 1024
PLAIN = 10_000
events = st.tuples(st.integers(0, 2000), st.integers(0, 300), st.integers(1, 1_000_000))


@given(
    floor=st.integers(1, 3000),
    capacity=st.integers(1, 3000),
    history=st.lists(events),
    decodes=st.integers(0, 9),
)
def test_whatever_was_seen_prompts_advance_and_fit(
    floor: int, capacity: int, history: list[tuple[int, int, int]], decodes: int
) -> None:
    pace = PromptPace(floor, capacity, STRETCH)
    for event in history:
        pace.observe(*event)
    assert pace.budget(0) == capacity
    budget = pace.budget(decodes)
    assert min(floor, capacity) <= budget <= capacity or budget == 0
    for _ in range(3):  # with nothing but prompts, they advance
        pace.observe(max(1, budget), decodes, 7)
        budget = max(budget, pace.budget(decodes))
    assert budget


@given(history=st.lists(events, min_size=1), decodes=st.integers(1, 9))
def test_what_was_seen_to_be_too_slow_is_not_asked_for(
    history: list[tuple[int, int, int]], decodes: int
) -> None:
    """Above the floor."""
    pace = PromptPace(FLOOR, CAPACITY, STRETCH)
    plain = sorted([duration for tokens, some, duration in history if some and not tokens][-64:])
    for tokens, some, duration in history:
        pace.observe(tokens, some, duration)
    budget = pace.budget(decodes)
    if not plain:
        return
    smallest = [duration for tokens, _, duration in history if 0 < tokens <= FLOOR][-4:]
    limit = STRETCH * max(plain[len(plain) // 2], min(smallest, default=0))
    slow = {
        size
        for size in pace.sizes[1:]
        if any(
            duration > limit
            for tokens, _, duration in [event for event in history if size // 2 < event[0] <= size][-4:]
        )
    }
    assert budget not in slow


def run(device: Callable[[int], int], steps: int, pace: PromptPace) -> list[tuple[int, int]]:
    """Of steps with prompts without end: tokens and duration. Each eighth has decodes alone."""
    done = []
    for step in range(steps):
        tokens = 0 if step % 8 == 0 else pace.budget(decodes=16)
        duration = device(tokens)
        pace.observe(tokens, 16, duration)
        if tokens:
            done.append((tokens, duration))
    return done


@given(
    fixed=st.integers(0, PLAIN // 2),
    per_token=st.integers(0, 100),
    eager_from=st.sampled_from([65, 129, 257, 513, 2000]),
    eager=st.integers(0, 10 * PLAIN),
)
def test_the_largest_chunk_that_keeps_the_pace_is_found(
    fixed: int, per_token: int, eager_from: int, eager: int
) -> None:
    """Even where a step suddenly costs much more, as without a graph: that is tried once in hundreds of steps."""

    def device(tokens: int) -> int:
        return PLAIN + (fixed + per_token * tokens + eager * (tokens >= eager_from) if tokens else 0)

    pace = PromptPace(FLOOR, CAPACITY, STRETCH)
    done = run(device, 400, pace)
    limit = STRETCH * max(PLAIN, device(FLOOR))
    good = [size for size in pace.sizes if device(size) <= limit]
    late = [duration for tokens, duration in done if duration > limit and tokens > FLOOR]
    assert len(late) <= 1
    wanted = max([FLOOR, *good])
    found = max(tokens for tokens, duration in done[20:])
    assert found <= wanted
    assert 2 * found >= wanted or eager


@pytest.mark.parametrize("later", [400, 1200])
def test_a_hiccup_is_forgotten(later: int) -> None:
    """Not at once: whoever was late may be so again."""
    pace = PromptPace(FLOOR, CAPACITY, STRETCH)
    run(lambda tokens: PLAIN + tokens, 50, pace)
    assert pace.budget(1) == CAPACITY
    pace.observe(256, 1, 100 * PLAIN)
    assert pace.budget(1) == 128
    run(lambda tokens: PLAIN + tokens, later, pace)
    assert (pace.budget(1) == CAPACITY) == (later > 512)


def test_a_burst_of_prompts_finds_its_pace_within_a_few_steps() -> None:
    """All begin at once, so that there is no step of decodes alone unless one is made."""
    pace = PromptPace(FLOOR, CAPACITY, STRETCH)
    sizes = []
    for _ in range(20):
        sizes.append(pace.budget(decodes=1))
        pace.observe(sizes[-1], 1, PLAIN + 5 * sizes[-1])
    assert sizes.count(0) == 1
    assert sizes[-1] == CAPACITY


def test_one_that_joins_while_others_have_prompts_is_not_left_behind() -> None:
    pace = PromptPace(FLOOR, CAPACITY, STRETCH)
    for _ in range(200):
        pace.budget(decodes=1)
        pace.observe(256, 1, PLAIN)
    assert pace.budget(decodes=1) >= FLOOR


def test_where_any_chunk_breaks_the_pace_larger_ones_that_cost_little_more_are_taken() -> None:
    """A step of few decodes reads few experts; with a chunk it reads all of them, however small the chunk is."""
    pace = PromptPace(FLOOR, CAPACITY, STRETCH)
    done = run(lambda tokens: PLAIN + (3 * PLAIN + 20 * tokens if tokens else 0), 100, pace)
    assert max(tokens for tokens, _ in done) == CAPACITY
