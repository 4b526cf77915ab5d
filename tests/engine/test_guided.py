"""Sequences with a grammar in an engine: what they say, and that nothing which happens to them changes it."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from elastic_ep.config import EngineLimits
from elastic_ep.engine.ops_cpu.runner import ModelRunner
from elastic_ep.engine.step_runner import StepResult
from elastic_ep.guided import grammars
from elastic_ep.guided.masks import MaskMaker
from elastic_ep.guided.shared import Guide
from elastic_ep.guided.vocabulary import Vocabulary
from elastic_ep.placement import launch_placement
from elastic_ep.wire.messages import Assign, Bias, Grammar, GrammarKind
from tests.engine.guided import END, OTHER_END, VOCABULARY, finish, mask_maker, opened, text
from tests.engine.solo import TINY, SoloExchange, assign, drain, dummy_weights, ids
from tests.kit.schemas import is_valid

SCHEMA = {
    "type": "object",
    "properties": {"ab": {"type": "integer", "minimum": 0, "maximum": 99}, "c": {"enum": [True, None, "xy"]}},
    "required": ["ab", "c"],
    "additionalProperties": False,
}
JSON = grammars.json_schema(SCHEMA, compact=True)
PATTERN = "[a-f]{8,12}-(12)+"
LIMITS = EngineLimits(max_model_len=120, num_pages=60)


@pytest.fixture
def makers() -> Iterator[list[MaskMaker]]:
    made: list[MaskMaker] = []
    yield made
    for maker in made:
        maker.close()


def guided_runner(
    makers: list[MaskMaker],
    limits: EngineLimits = LIMITS,
    exchange: SoloExchange | None = None,
    vocabulary: Vocabulary = VOCABULARY,
) -> ModelRunner:
    placement = launch_placement(1, TINY.moe_layers, TINY.moe.experts, 0)
    makers.append(mask_maker() if vocabulary is VOCABULARY else MaskMaker(Guide.of(vocabulary)))
    weights = dummy_weights(TINY, placement)
    return ModelRunner(
        limits, weights, placement, 0, exchange or SoloExchange(TINY.moe.experts), masks=makers[-1]
    )


def ask(number: int, grammar: Grammar | None, emitted: list[int] | None = None, **params: Any) -> Assign:
    params = {"temperature": 1.0, "max_tokens": 60, "ignore_eos": False, **params}
    return assign(number, [5, 6, 7 + number], emitted, number, grammar=grammar, **params)


def test_texts_follow_their_grammars_beside_others_that_have_none(makers: list[MaskMaker]) -> None:
    runner = guided_runner(makers)
    for number in range(9):
        runner.add(ask(number, [JSON, grammars.regex(PATTERN), None][number % 3]))
    together = finish(runner)
    for number, tokens in together.items():
        said = ids(tokens)
        if number % 3 == 0:
            assert is_valid(text(said), SCHEMA), text(said)
            assert (said[-1], tokens[-1].finish) == (END, "stop")
        elif number % 3 == 1:
            assert re.fullmatch(PATTERN, text(said))
    runner = guided_runner(makers)
    runner.add(ask(2, None))
    assert ids(drain(runner)[2]) == ids(together[2]), "guiding others changes nothing"


@pytest.mark.parametrize("grammar", [JSON, grammars.regex(PATTERN)], ids=["json", "pattern"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_text_that_is_taken_over_goes_on_as_it_would_have(
    makers: list[MaskMaker], grammar: Grammar, temperature: float
) -> None:
    runner = guided_runner(makers)
    runner.add(ask(1, grammar, temperature=temperature))
    whole = ids(finish(runner)[1])
    for cut in range(len(whole)):
        runner.add(ask(1, grammar, whole[:cut], temperature=temperature))
        assert ids(finish(runner)[1]) == whole[cut:], cut


def test_poisoned_steps_and_preemption_change_nothing(makers: list[MaskMaker]) -> None:
    asks = [ask(number, [JSON, grammars.regex(PATTERN)][number % 2]) for number in range(4)]
    alone = {}
    for each in asks:
        runner = guided_runner(makers)
        runner.add(each)
        alone.update(finish(runner))
    exchange = SoloExchange(TINY.moe.experts)
    runner = guided_runner(makers, exchange=exchange)
    for each in asks:
        runner.add(each)
    opened(runner)
    seen: dict[int, list[int]] = {}
    for step in range(400):
        if not runner.has_work:
            break
        if step % 3 == 1:
            exchange.poison, exchange.garbage = frozenset({3}), True
        if step % 3 == 0 and (running := runner._scheduler.running):
            runner._scheduler._preempt(running[step % len(running)])
        for token in runner.run_step(step, schedule=True).tokens:
            seen.setdefault(token.request_id, []).append(token.token)
    assert runner.preemptions > 5
    assert seen == {number: ids(tokens) for number, tokens in alone.items()}


def test_what_else_is_asked_for_chooses_among_what_may_come(makers: list[MaskMaker]) -> None:
    wishes: list[dict[str, Any]] = [
        {"min_tokens": 50},
        {"logit_bias": (Bias(4 + ord("z") - 10, 100.0), Bias(4 + ord("f") - 10, 100.0))},
        {"repetition_penalty": 2.0, "presence_penalty": 2.0, "frequency_penalty": 2.0},
        {"top_k": 1},
        {"top_p": 0.01, "min_p": 0.5},
        {"logprobs": 3},
        {"stop_token_ids": (OTHER_END,)},
        {"temperature": 0.0, "logit_bias": (Bias(OTHER_END, 100.0),), "stop_token_ids": (OTHER_END,)},
    ]
    runner = guided_runner(makers)
    for number, wish in enumerate(wishes):
        runner.add(ask(number, grammars.regex("[a-f]{8,12}"), **wish))
    done = finish(runner)
    for tokens in done.values():
        assert re.fullmatch("[a-f]{8,12}", text(ids(tokens)))
        assert tokens[-1].finish == "stop"
    assert text(ids(done[1])) == "f" * 12, "the bias for what may come counts"
    assert all(len(token.top) == 3 for token in done[5])
    assert ids(done[7])[-1] == OTHER_END


def test_a_text_may_be_cut_by_its_length(makers: list[MaskMaker]) -> None:
    runner = guided_runner(makers)
    runner.add(ask(1, grammars.regex("[a-f]{8,12}"), max_tokens=5))
    tokens = finish(runner)[1]
    assert tokens[-1].finish == "length"
    assert re.fullmatch("[a-f]+", text(ids(tokens)))


def test_without_a_vocabulary_it_is_refused(makers: list[MaskMaker]) -> None:
    placement = launch_placement(1, TINY.moe_layers, TINY.moe.experts, 0)
    runner = ModelRunner(LIMITS, dummy_weights(TINY, placement), placement, 0, SoloExchange(TINY.moe.experts))
    assert "vocabulary" in runner.add(ask(1, JSON))
    assert not runner.has_work


def test_those_whose_grammar_is_being_compiled_wait_and_can_be_cancelled(makers: list[MaskMaker]) -> None:
    runner = guided_runner(makers)
    runner.add(ask(1, JSON))
    runner.add(ask(2, JSON))
    assert (*runner.held, runner.waiting, runner.has_work) == (1, 2, 2, True)
    runner.cancel(1)
    runner.add(ask(2, grammars.regex("ab")))  # anew
    assert [*runner.held] == [2]
    assert set(finish(runner)) == {2}


def fails(runner: ModelRunner) -> dict[int, str]:
    """Of all steps until there is nothing to do."""
    failed: dict[int, str] = {}
    opened(runner)
    for step in range(200):
        if not runner.has_work:
            return failed
        result: StepResult = runner.run_step(step, schedule=True)
        failed.update(result.failed)
    raise AssertionError("not done")


def test_what_cannot_be_followed_fails_alone(makers: list[MaskMaker]) -> None:
    """Whatever the gateway has let through. The reason holds nothing of the client's."""
    runner = guided_runner(makers)
    runner.add(ask(1, Grammar(GrammarKind.LARK, "start: secret")))
    runner.add(ask(2, grammars.regex("ab"), emitted=[4 + ord("z") - 10]))
    runner.add(ask(3, grammars.regex("[ab]{5}")))
    failed = fails(runner)
    assert failed.keys() == {1, 2}
    assert "grammar" in failed[1]
    assert "secret" not in json.dumps(failed)


def test_a_text_that_no_token_continues_fails_alone(makers: list[MaskMaker]) -> None:
    tokens = tuple(b"" if token == b"z" else token for token in VOCABULARY.tokens)
    runner = guided_runner(makers, vocabulary=Vocabulary(tokens, VOCABULARY.special, VOCABULARY.ends))
    runner.add(ask(1, grammars.regex("abz")))
    runner.add(ask(2, grammars.regex("[ab]{6}")))
    failed = fails(runner)
    assert failed.keys() == {1}
    assert "cannot be continued" in failed[1]
