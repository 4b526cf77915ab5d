"""The engine in C++ against plain torch, and against itself: no neighbour, chunk, replay or build changes a bit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_ep.config import EngineLimits
from elastic_ep.engine.ops_cpu import fused_runner as runner_module
from elastic_ep.engine.ops_cpu.fused_runner import FusedRunner
from elastic_ep.engine.sampler import Sampled, sample
from elastic_ep.engine.scheduler import Chunk, Sequence
from elastic_ep.engine.step_runner import StepRunner
from elastic_ep.fused.library import best_build, load, usable_builds
from elastic_ep.guided.text import Words
from elastic_ep.placement import launch_placement
from elastic_ep.weights.bank import Weights, dummy_source
from elastic_ep.wire.messages import SamplingParams
from tests.engine.solo import SoloExchange, assign, drain, dummy_weights, ids, solo_runner
from tests.engine.test_invariance import (
    NEW_TOKENS,
    SPECS,
    TARGET,
    TARGET_PROMPT,
    alone,
    assert_same,
    recorded_logits,
    weights_of,
)
from tests.kit.fused import FusedAlone, fused_runner, needs_fused

pytestmark = needs_fused()
LIMITS = EngineLimits(max_model_len=400, max_num_batched_tokens=200, num_pages=200)
_Logits = dict[tuple[int, int], torch.Tensor]
_alone: dict[str, _Logits] = {}


def target_alone(name: str, build: str = "", weights: Weights | None = None) -> _Logits:
    """The target by itself, its prompt in one chunk."""
    runner, _ = fused_runner(weights or weights_of(name), LIMITS, build)
    runner.warm_up()
    runner.add(assign(TARGET, TARGET_PROMPT, max_tokens=NEW_TOKENS))
    with recorded_logits() as seen:
        drain(runner)
    return seen


def fused_alone(name: str) -> _Logits:
    if name not in _alone:
        _alone[name] = target_alone(name)
    return _alone[name]


@pytest.mark.parametrize("name", sorted(SPECS))
def test_logits_are_those_of_plain_torch(name: str) -> None:
    theirs = alone(name)
    ours = fused_alone(name)
    assert ours.keys() == theirs.keys()
    for place, row in ours.items():
        torch.testing.assert_close(row, theirs[place], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("name", sorted(SPECS))
def test_every_build_gives_the_same_bits(name: str) -> None:
    for build in usable_builds():
        assert_same(target_alone(name, build), fused_alone(name))


@pytest.mark.parametrize("name", sorted(SPECS))
def test_weights_in_bfloat16_give_the_bits_of_the_same_ones_in_float32(name: str) -> None:
    spec = SPECS[name]
    placement = launch_placement(1, spec.moe_layers, spec.moe.experts, 0)
    made = dummy_source(spec, seed=0)

    def rounded(tensor: str) -> torch.Tensor:
        return (made(tensor) * 1.001).bfloat16().float()  # of norms, too, none is one

    for build in usable_builds():
        narrow, wide = (
            target_alone(name, build, Weights(spec, placement, 0, rounded, torch.device("cpu"), dtype))
            for dtype in (torch.bfloat16, torch.float32)
        )
        assert_same(narrow, wide)


@settings(max_examples=30, deadline=None)
@given(
    name=st.sampled_from(sorted(SPECS)),
    budget=st.integers(17, 150),
    page_size=st.sampled_from([8, 16, 32]),
    before=st.lists(st.integers(1, 300), max_size=3),
    after=st.lists(st.integers(1, 300), max_size=3),
    head_start=st.integers(0, 6),
    replayed=st.integers(0, NEW_TOKENS - 1),
)
def test_neighbours_chunking_and_replay_change_no_bit(
    name: str,
    budget: int,
    page_size: int,
    before: list[int],
    after: list[int],
    head_start: int,
    replayed: int,
) -> None:
    expected = fused_alone(name)
    emitted = [int(expected[TARGET, len(TARGET_PROMPT) + i].argmax()) for i in range(replayed)]
    limits = EngineLimits(400, 16, budget, page_size, num_pages=4000 // page_size)
    runner, _ = fused_runner(weights_of(name), limits)
    fill_caches(runner, torch.nan)  # what nobody has computed is nobody's to read
    for number, length in enumerate(before):
        runner.add(assign(100 + number, [(number + i) % 89 for i in range(length)], max_tokens=9))
    for step in range(head_start):
        runner.run_step(step, schedule=True)
    runner.add(assign(TARGET, TARGET_PROMPT, emitted, max_tokens=NEW_TOKENS))
    for number, length in enumerate(after):
        runner.add(assign(200 + number, [(5 * number + i) % 89 for i in range(length)], max_tokens=9))
    with recorded_logits() as seen:
        tokens = drain(runner)
    assert len(tokens[TARGET]) == NEW_TOKENS - replayed
    assert_same(seen, expected)


def fill_caches(runner: StepRunner, value: float) -> None:
    for cache in runner._model.caches:  # type: ignore[attr-defined]
        cache.fill_(value)


@settings(max_examples=10, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 60), st.floats(0, 2), st.floats(0.1, 1)), min_size=1, max_size=4))
def test_a_poisoned_step_leaves_no_trace(requests: list[tuple[int, float, float]]) -> None:
    """Every second step is poisoned, and what the experts returned was garbage."""

    def run(poisoned: bool) -> dict[int, list[int]]:
        runner, exchange = fused_runner(weights_of("tiny"), EngineLimits(max_model_len=400, num_pages=200))
        for number, (length, temperature, top_p) in enumerate(requests):
            prompt = [(number * 11 + i) % 200 for i in range(length)]
            runner.add(assign(number, prompt, temperature=temperature, top_p=top_p, seed=number))
        out: dict[int, list[int]] = {number: [] for number in range(len(requests))}
        step = 0
        while runner.has_work:
            spoil = poisoned and step % 2 == 0
            exchange.poison, exchange.garbage = frozenset({5} if spoil else ()), spoil
            result = runner.run_step(step, schedule=True)
            assert result.masked == ({5} if spoil else frozenset())
            for token in result.tokens:
                out[token.request_id].append(token.token)
            step += 1
        return out

    assert run(poisoned=True) == run(poisoned=False)


@pytest.mark.parametrize("place", ["make_batch", "sample", "step", "range"])
def test_a_request_that_raises_fails_alone(place: str) -> None:
    """Its steps perform all their operations."""
    runner, exchange = fused_runner(weights_of("tiny"), EngineLimits(max_model_len=400, num_pages=200))
    expected, _ = fused_runner(weights_of("tiny"), EngineLimits(max_model_len=400, num_pages=200))
    for number in range(6):
        runner.add(assign(number, [number + 3, 7, 9], max_tokens=5))
        if number != 4:
            expected.add(assign(number, [number + 3, 7, 9], max_tokens=5))
    texts, failed = with_fault(runner, exchange, place, bad=4)
    assert failed == {4}
    assert texts == {number: ids(tokens) for number, tokens in drain(expected).items()}


def with_fault(
    runner: StepRunner, exchange: FusedAlone, place: str, bad: int
) -> tuple[dict[int, list[int]], set[int]]:
    model = runner._model  # type: ignore[attr-defined]
    make, forward = model.make_batch, model.forward
    in_batch = False

    def making(chunks: list) -> object:  # type: ignore[type-arg]
        nonlocal in_batch
        in_batch = any(chunk.sequence.request_id == bad for chunk in chunks)
        if in_batch and place == "make_batch":
            raise ArithmeticError(place)
        batch = make(chunks)
        if in_batch and place == "range":
            batch.words[-1] = len(batch.words)  # sampled: a token that is not there
        return batch

    def computing(batch: object, peers: object) -> torch.Tensor:
        if in_batch and place == "step":
            raise ArithmeticError(place)
        logits: torch.Tensor = forward(batch, peers)
        return logits

    def sampling(
        logits: torch.Tensor, sequences: list[Sequence], masks: Words | None = None
    ) -> list[Sampled]:
        if place == "sample" and any(sequence.request_id == bad for sequence in sequences):
            raise ArithmeticError(place)
        return sample(logits, sequences, masks)

    texts: dict[int, list[int]] = {}
    failed: set[int] = set()
    with (
        mock.patch.object(model, "make_batch", making),
        mock.patch.object(model, "forward", computing),
        mock.patch.object(runner_module, "sample", sampling),
    ):
        for step in range(60):
            before = exchange.operations
            result = runner.run_step(step, schedule=True)
            assert exchange.operations - before == exchange.shape.operations_per_step
            failed |= {request for request, _ in result.failed}
            for token in result.tokens:
                texts.setdefault(token.request_id, []).append(token.token)
    assert not runner.has_work
    return texts, failed


def _token_beyond(sequence: Sequence) -> None:
    sequence.tokens[3] = SPECS["tiny"].vocab_size


def _negative_token(sequence: Sequence) -> None:
    sequence.tokens[3] = -1


def _page_beyond(sequence: Sequence) -> None:
    sequence.pages[1] = LIMITS.cache_pages


def _negative_page(sequence: Sequence) -> None:
    sequence.pages[0] = -1


def _page_missing(sequence: Sequence) -> None:
    sequence.pages.pop()


@pytest.mark.parametrize(
    "spoil", [_token_beyond, _negative_token, _page_beyond, _negative_page, _page_missing]
)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_batch_that_reaches_outside_of_the_memory_is_not_computed(
    spoil: Callable[[Sequence], None], place: int
) -> None:
    runner, _ = fused_runner(weights_of("tiny"), LIMITS)
    model = runner._model
    chunks = [_chunk(number, LIMITS.page_size + 5) for number in range(3)]
    assert np.isfinite(model.try_out(model.make_batch(chunks))).all()
    spoil(chunks[place].sequence)
    with pytest.raises(RuntimeError, match="out of range"):
        model.try_out(model.make_batch(chunks))


@pytest.mark.parametrize(
    ("limits", "lengths"),
    [
        (replace(LIMITS, max_num_batched_tokens=9, max_num_seqs=9), [5, 5]),
        (replace(LIMITS, max_num_seqs=1), [5, 5]),
        (replace(LIMITS, max_model_len=20), [21]),
    ],
    ids=["tokens", "sequences", "positions"],
)
def test_a_batch_that_is_too_large_is_not_computed(limits: EngineLimits, lengths: list[int]) -> None:
    runner, _ = fused_runner(weights_of("tiny"), limits)
    model = runner._model
    chunks = [_chunk(number, length) for number, length in enumerate(lengths)]
    with pytest.raises(RuntimeError, match="out of range"):
        model.try_out(model.make_batch(chunks))
    for chunk in chunks:
        chunk.sequence.tokens.pop()
    fits = [_chunk(0, lengths[0] - 1)]
    assert np.isfinite(model.try_out(model.make_batch(fits))).all()


def _chunk(number: int, length: int) -> Chunk:
    pages = [10 * number + page for page in range(-(-length // LIMITS.page_size))]
    sequence = Sequence(number, [7] * length, length, SamplingParams(max_tokens=1), 0, 0, pages=pages)
    return Chunk(sequence, 0, length)


def test_a_sequence_to_the_last_position_in_steps_of_all_tokens() -> None:
    """As many pages, tokens and positions as there are, and not one more."""
    limits = EngineLimits(max_model_len=32, max_num_batched_tokens=16, max_num_seqs=16, num_pages=2)
    spec, weights = SPECS["tiny"], weights_of("tiny")
    fused, _ = fused_runner(weights, limits)
    plain = solo_runner(spec, limits=limits, weights=weights)
    for runner in (fused, plain):
        runner.add(assign(TARGET, TARGET_PROMPT[:17], max_tokens=500))
    texts = [ids(drain(runner)[TARGET]) for runner in (fused, plain)]
    assert texts[0] == texts[1]
    assert len(texts[0]) == limits.max_model_len - 17


@pytest.mark.parametrize("field", ["max_tokens", "hidden", "top_k", "slots_per_rank", "operations_per_step"])
def test_an_exchange_of_another_shape_is_refused(field: str) -> None:
    weights = weights_of("tiny")
    spec, name = weights.spec, best_build()
    placement = launch_placement(1, spec.moe_layers, spec.moe.experts, 0)
    shape = spec.exchange_shape(LIMITS.max_num_batched_tokens, placement)
    other = FusedAlone(replace(shape, **{field: getattr(shape, field) * 2}), weights, name)
    with pytest.raises(ValueError, match="expected"):
        FusedRunner(load(name), LIMITS, weights, placement, 0, other)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda weights: weights.layers[1].update(gate=weights.layers[1]["gate"].bfloat16()),
        lambda weights: weights.layers[1].update(down=weights.layers[1]["down"].transpose(1, 2)),
        lambda weights: setattr(weights, "lm_head", weights.lm_head.double()),
        lambda weights: setattr(weights, "embed", weights.embed.half()),
    ],
)
def test_weights_that_lie_otherwise_are_refused(spoil: Callable[[Weights], None]) -> None:
    spec = SPECS["tiny"]
    weights = dummy_weights(spec, launch_placement(1, spec.moe_layers, spec.moe.experts, 0))
    spoil(weights)
    with pytest.raises(ValueError, match="expected"):
        fused_runner(weights, LIMITS)


def test_rows_are_counted_as_the_slots_load() -> None:
    """As many as in plain torch, by expert."""
    fused, _ = fused_runner(weights_of("tiny"), LIMITS)
    exchange = SoloExchange(SPECS["tiny"].moe.experts)
    plain = solo_runner(SPECS["tiny"], limits=LIMITS, weights=weights_of("tiny"), exchange=exchange)
    for runner in (fused, plain):
        runner.add(assign(TARGET, TARGET_PROMPT, max_tokens=NEW_TOKENS))
        drain(runner)
    assert fused.load.take() == plain.load.take()
    assert not any(map(any, fused.load.take()))
