"""An exception in a step is a sequence's: that one ends, the others' tokens are the same to the bit."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_ep.config import EngineLimits
from elastic_ep.engine.interrupted import BrokenStep
from elastic_ep.engine.ops_cpu.runner import ModelRunner
from elastic_ep.exchange.base import ExchangeShape
from elastic_ep.placement import launch_placement
from elastic_ep.wire.messages import Assign, Member, SamplingParams
from tests.engine.faulty import PLACES, Poisoned, faulty, interrupt
from tests.engine.solo import TINY, SoloExchange, assign, dummy_weights, solo_runner
from tests.engine.test_invariance import recorded_logits
from tests.kit.loopback import LoopbackHub

LIMITS = EngineLimits(max_model_len=100, max_num_seqs=8, max_num_batched_tokens=20, num_pages=60)
NEW = 5
LAYERS = len(TINY.layers)
Texts = dict[int, list[int]]


def request(number: int) -> Assign:
    """Prompts of different lengths, so that some are cut into chunks; half sampled, some with logprobs."""
    prompt = [(number * 31 + 7 * place) % 200 for place in range(1 + 6 * number)]
    how = {"temperature": 1.0} if number % 2 else {"logprobs": number // 2}
    return assign(number, prompt, max_tokens=NEW, seed=number, **how)


def run(runner: ModelRunner, exchange: SoloExchange, numbers: range) -> tuple[Texts, dict[int, str]]:
    """The texts, and who has failed why. Every step performs all of its operations."""
    for number in numbers:
        assert runner.add(request(number)) == ""
    texts: Texts = {number: [] for number in numbers}
    failed: dict[int, str] = {}
    for step in range(400):
        if not runner.has_work:
            break
        before = exchange.operations
        result = runner.run_step(step, schedule=True)
        assert exchange.operations - before == 2 * LAYERS
        for token in result.tokens:
            assert token.index == len(texts[token.request_id])
            texts[token.request_id].append(token.token)
        failed |= dict(result.failed)
    assert not runner.has_work
    assert runner._scheduler.pages.free == LIMITS.num_pages
    return texts, failed


_undisturbed: list[Texts] = []


def undisturbed() -> Texts:
    if not _undisturbed:
        exchange = SoloExchange(TINY.moe.experts)
        _undisturbed.append(run(solo_runner(limits=LIMITS, exchange=exchange), exchange, range(12))[0])
    return _undisturbed[0]


@pytest.mark.parametrize("place", PLACES)
@settings(max_examples=6, deadline=None)
@given(bad=st.frozensets(st.integers(0, 11), min_size=1, max_size=4))
def test_exactly_the_bad_requests_fail(place: str, bad: frozenset[int]) -> None:
    exchange = SoloExchange(TINY.moe.experts)
    runner = solo_runner(limits=LIMITS, exchange=exchange)
    with faulty(runner, bad, place):
        texts, failed = run(runner, exchange, range(12))
    assert failed.keys() == bad
    assert all("Poisoned" in reason for reason in failed.values())
    for number, text in undisturbed().items():
        assert texts[number] == (text if number not in bad else [])


def test_all_may_be_bad() -> None:
    exchange = SoloExchange(TINY.moe.experts)
    runner = solo_runner(limits=LIMITS, exchange=exchange)
    with faulty(runner, frozenset(range(12)), "sample"):
        texts, failed = run(runner, exchange, range(12))
    assert failed.keys() == set(range(12))
    assert not any(texts.values())


def test_a_step_that_is_poisoned_too_blames_nobody() -> None:
    exchange = SoloExchange(TINY.moe.experts)
    runner = solo_runner(limits=LIMITS, exchange=exchange)
    runner.add(request(0))
    with faulty(runner, frozenset({0}), "make"):
        exchange.poison = frozenset({1})
        assert runner.run_step(0, schedule=True).masked == {1}
    texts, failed = run(runner, exchange, range(1))
    assert (texts[0], failed) == (undisturbed()[0], {})


def test_what_is_cancelled_while_it_is_a_suspect_is_not_run_again() -> None:
    exchange = SoloExchange(TINY.moe.experts)
    runner = solo_runner(limits=LIMITS, exchange=exchange)
    for number in (0, 1):
        runner.add(request(number))
    with faulty(runner, frozenset({1}), "make"):
        assert not runner.run_step(0, schedule=True).failed
        runner.cancel(1)
        tokens = [runner.run_step(step, schedule=True) for step in range(1, 1 + NEW)]
    assert not any(result.failed for result in tokens)
    assert [token.token for result in tokens for token in result.tokens] == undisturbed()[0]


def test_what_fails_without_a_sequence_too_is_the_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    exchange = SoloExchange(TINY.moe.experts)
    runner = solo_runner(limits=LIMITS, exchange=exchange)
    runner.add(request(0))

    def broken(*arguments: object) -> None:
        raise Poisoned("always")

    monkeypatch.setattr("elastic_ep.engine.ops_cpu.runner.sample", broken)
    with pytest.raises(Poisoned):
        runner.run_step(0, schedule=True)
    assert runner.suspects == (), "nothing here remembers a fault"


@pytest.mark.parametrize("operation", ["dispatch", "combine"])
def test_an_error_of_the_exchange_is_the_ranks(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    exchange = SoloExchange(TINY.moe.experts)
    runner = solo_runner(limits=LIMITS, exchange=exchange)
    runner.add(request(0))

    def broken(*arguments: object) -> None:
        raise Poisoned("exchange")

    monkeypatch.setattr(exchange, operation, broken)
    with pytest.raises(BrokenStep):
        runner.run_step(0, schedule=True)


class Peer:
    """One of two ranks, on a thread of its own, in lockstep with the other."""

    def __init__(self, hub: LoopbackHub, rank: int) -> None:
        self.runner = group_runner(hub, rank)
        self.numbers = range(rank, 8, 2)
        self.texts: Texts = {number: [] for number in self.numbers}
        self.failed: set[int] = set()
        self.masked: set[int] = set()
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self._steps()
        except BaseException as error:  # shown by the test
            self.error = error

    @torch.inference_mode()
    def _steps(self) -> None:
        for number in self.numbers:
            self.runner.add(request(number))
        for step in range(60):
            result = self.runner.run_step(step, schedule=True)
            self.masked |= result.masked
            self.failed |= dict(result.failed).keys()
            for token in result.tokens:
                self.texts[token.request_id].append(token.token)


def group_runner(hub: LoopbackHub, rank: int) -> ModelRunner:
    placement = launch_placement(2, LAYERS, TINY.moe.experts, 0)
    exchange = hub.end(Member(rank, 1))
    exchange.activate(Member(1 - rank, 1))
    weights = dummy_weights(TINY, placement, rank)
    return ModelRunner(LIMITS, weights, placement, rank, exchange)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("operation", range(2 * LAYERS))
def test_peers_notice_nothing(operation: int) -> None:
    """Both ranks' good texts are the ones of a rank by itself: a step is completed with this rank's experts in it."""
    shape = ExchangeShape(
        num_ranks=2,
        max_tokens=LIMITS.max_num_batched_tokens,
        hidden=TINY.hidden_size,
        top_k=TINY.moe.top_k,
        slots_per_rank=TINY.moe.experts // 2,
        operations_per_step=2 * LAYERS,
    )
    hub = LoopbackHub(shape)
    peers = [Peer(hub, rank) for rank in range(2)]
    interrupt(peers[0].runner, 2, operation)
    threads = [threading.Thread(target=peer.run, daemon=True) for peer in peers]
    with recorded_logits() as seen:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(50)
            assert not thread.is_alive(), "a rank waits for its peer"
    assert [peer.error for peer in peers] == [None, None]
    assert [peer.failed for peer in peers] == [{2}, set()]
    assert not peers[0].masked | peers[1].masked
    for number, text in itertools.chain(peers[0].texts.items(), peers[1].texts.items()):
        assert text == ([] if number == 2 else undisturbed()[number])
    exchange = SoloExchange(TINY.moe.experts)
    with recorded_logits() as alone:
        run(solo_runner(limits=LIMITS, exchange=exchange), exchange, range(8))
    assert len(seen) >= 7 * NEW
    assert all(torch.equal(row, alone[key]) for key, row in seen.items() if key[0] >= 0)  # -1: a proof


# Refusals


@pytest.mark.parametrize(
    ("assigned", "why"),
    [
        (assign(1, []), "no tokens"),
        (assign(1, [5, 211]), "token 211 of its prompt"),
        (assign(1, [-1, 5]), "token -1 of its prompt"),
        (assign(1, [5], [4, 999]), "token 999 of its output"),
        (assign(1, [5] * 100), "it has 100 tokens"),
        (assign(1, [5] * 60, [5] * 40, max_tokens=50), "it has 100 tokens"),
        (assign(1, [5], [5, 6], max_tokens=2), "all of its 2 tokens"),
        (assign(1, [5], temperature=float("nan")), "temperature is nan"),
        (assign(1, [5], temperature=-1.0), "temperature is -1.0"),
        (assign(1, [5], repetition_penalty=0.0), "repetition_penalty is 0.0"),
        (assign(1, [5], logprobs=-1), "logprobs is -1"),
    ],
)
def test_what_cannot_be_computed_is_refused_with_a_reason(assigned: Assign, why: str) -> None:
    runner = solo_runner(limits=LIMITS)
    assert why in runner.add(assigned)
    assert not runner.has_work


def test_the_same_request_twice_runs_once() -> None:
    exchange = SoloExchange(TINY.moe.experts)
    runner = solo_runner(limits=LIMITS, exchange=exchange)
    runner.add(request(3))
    texts, failed = run(runner, exchange, range(4))
    assert (texts, failed) == ({number: undisturbed()[number] for number in range(4)}, {})


def test_what_is_no_request_at_all_is_refused() -> None:
    runner = solo_runner(limits=LIMITS)
    params = SamplingParams(max_tokens=4)
    assert "TypeError" in runner.add(Assign(1, (5, None), (), params, 0, 0))  # type: ignore[arg-type]  # a forged one
