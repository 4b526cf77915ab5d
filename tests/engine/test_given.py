"""Tokens of a prompt that are given, not drawn: their log-probabilities have the same bits however they were computed."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_ep.config import EngineLimits
from elastic_ep.engine.step_runner import StepRunner
from elastic_ep.wire.messages import Token, TopLogprob
from tests.engine.solo import TINY, SoloExchange, assign, drain, solo_runner
from tests.engine.test_invariance import weights_of
from tests.kit.fused import FusedAlone, fused_runner, needs_fused

LONGEST = 24
PROMPT = [(7 * i * i + 3 * i + 5) % 90 for i in range(13)]
TOP = 3
Scores = list[tuple[int, float | None, tuple[TopLogprob, ...]]]
Make = Callable[[EngineLimits], StepRunner]


def torch_runner(limits: EngineLimits) -> StepRunner:
    return solo_runner(TINY, limits=limits, weights=weights_of("tiny"))


def cpp_runner(limits: EngineLimits) -> StepRunner:
    return fused_runner(weights_of("tiny"), limits)[0]


RUNNERS = {"torch": torch_runner, "cpp": cpp_runner}
KINDS = ["torch", pytest.param("cpp", marks=needs_fused())]


def limits(**changes: int) -> EngineLimits:
    return EngineLimits(**({"max_model_len": LONGEST, "num_pages": 60, "page_size": 8} | changes))


def scores(tokens: list[Token]) -> Scores:
    return [(token.token, token.logprob, token.top) for token in tokens]


@cache
def one_by_one(kind: str, drawn: int) -> Scores:
    """The oracle: each token is drawn behind the prompt before it, as nothing else is allowed; then `drawn` more."""
    runner, found = RUNNERS[kind](limits()), []
    for place in range(1, len(PROMPT)):
        only = (PROMPT[place],)
        runner.add(assign(place, PROMPT[:place], max_tokens=1, logprobs=TOP, allowed_token_ids=only))
        found += scores(drain(runner)[place])
    if drawn:
        runner.add(assign(0, PROMPT, max_tokens=drawn, presence_penalty=0.5, min_tokens=drawn, logprobs=0))
        found += scores(drain(runner)[0])
    return found


def ask(runner: StepRunner, number: int, told: int, drawn: int, before: Scores | None = None) -> None:
    emitted = [token for token, _, _ in (before or [])[:told]]
    given = tuple(PROMPT[1:])
    params: dict[str, Any] = {
        "presence_penalty": 0.5,
        "min_tokens": drawn,
        "logprobs": 0,
        "given_logprobs": TOP,
    }
    asked = assign(number, PROMPT[:1], emitted, max_tokens=len(given) + drawn, given=given, **params)
    assert runner.add(asked) == ""


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_they_are_scored_as_if_each_were_drawn_alone(kind: str, data: st.DataObject) -> None:
    """Whoever else is there, in chunks of any size, with few pages, after a move at any token, after poisoned steps."""
    drawn = data.draw(st.integers(0, 3))
    seats = data.draw(st.integers(1, 6))
    runner = RUNNERS[kind](
        limits(
            max_num_seqs=seats,
            max_num_batched_tokens=data.draw(st.integers(seats, 16)),
            num_pages=data.draw(st.sampled_from([3, 5, 60])),
        )
    )
    expected = one_by_one(kind, drawn)
    asked = data.draw(st.lists(st.integers(0, len(expected) - 1), min_size=1, max_size=3))
    poisoned = data.draw(st.sets(st.integers(0, 20), max_size=4))
    for number, told in enumerate(asked):
        ask(runner, number, told, drawn, expected)
        runner.add(assign(100 + number, PROMPT[: 1 + told], max_tokens=5))
    found: dict[int, list[Token]] = {number: [] for number in range(len(asked))}
    for step in range(600):
        if not runner.has_work:
            break
        exchange = runner._exchange
        assert isinstance(exchange, SoloExchange | FusedAlone)
        if step in poisoned:
            exchange.poison, exchange.garbage = frozenset({1}), True
        for token in runner.run_step(step, schedule=True).tokens:
            if token.request_id in found:
                found[token.request_id].append(token)
    for number, told in enumerate(asked):
        assert scores(found[number]) == expected[told:]
        assert [token.index for token in found[number]] == list(range(told, len(expected)))
        assert [token.finish for token in found[number]][-1] == "length"
    assert runner._scheduler.pages.free == runner.num_pages


def test_several_a_step() -> None:
    """As many as there are seats: a prompt takes no step for each of its tokens."""
    runner = torch_runner(limits(max_num_seqs=8, max_num_batched_tokens=64))
    ask(runner, 0, 0, 0)
    steps = [len(runner.run_step(step, schedule=True).tokens) for step in range(2)]
    assert steps == [8, 4]
    assert not runner.has_work


def test_nothing_is_taken_from_pages_that_has_to_be_scored() -> None:
    runner = torch_runner(limits())
    for number in range(2):
        ask(runner, number, 0, 1)
        assert len(drain(runner)[number]) == len(PROMPT)
    assert runner.page_counts.hits == 0


@pytest.mark.parametrize(
    ("told", "wrong"), [([], {"max_tokens": 1}), ([5], {}), ([], {"given": (211,)}), ([], {"given_logprobs": -1})]
)  # fmt: skip
def test_what_makes_no_sense_is_refused(told: list[int], wrong: dict[str, Any]) -> None:
    params: dict[str, Any] = {"given": (7, 8), "max_tokens": 9} | wrong
    assert torch_runner(limits()).add(assign(0, [1], told, **params)) != ""
