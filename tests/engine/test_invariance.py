"""A sequence's logits are bitwise the same whoever else is in the batch and however its tokens were cut into steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_ep.config import EngineLimits
from elastic_ep.engine.ops_cpu import fused_runner as fused_runner_module
from elastic_ep.engine.ops_cpu import runner as runner_module
from elastic_ep.engine.ops_cpu.layers import ROWS, Rope, linear
from elastic_ep.engine.sampler import Sampled, sample
from elastic_ep.engine.scheduler import Sequence
from elastic_ep.guided.text import Words
from elastic_ep.models import mixtral, olmoe, qwen3_moe
from elastic_ep.models.spec import Rotary
from elastic_ep.placement import launch_placement
from elastic_ep.weights.bank import Weights
from tests.engine.solo import TINY, TINY_CONFIG, SoloExchange, assign, drain, dummy_weights, ids, solo_runner

LARGER = replace(
    TINY_CONFIG, vocab_size=1024, hidden_size=128, head_dim=32, num_experts=16, moe_intermediate_size=64
)
ODD = replace(
    TINY_CONFIG,
    vocab_size=97,
    hidden_size=40,
    num_attention_heads=3,
    num_key_value_heads=1,
    head_dim=10,
    num_experts=5,
    num_experts_per_tok=3,
    moe_intermediate_size=23,
    norm_topk_prob=False,
)
SPECS = {
    "tiny": TINY,
    "larger": qwen3_moe.spec(LARGER),
    "odd": qwen3_moe.spec(ODD),
    "mixtral": mixtral.spec(replace(TINY_CONFIG, head_dim=32)),
    "olmoe": olmoe.spec(replace(LARGER, norm_topk_prob=False), clip_qkv=0.05),
}
TARGET = 0
TARGET_PROMPT = [(7 * i * i + 3 * i + 5) % 90 for i in range(137)]
NEW_TOKENS = 6

_Logits = dict[tuple[int, int], torch.Tensor]
"""By (request, number of known tokens)."""


@contextmanager
def recorded_logits() -> Iterator[_Logits]:
    seen: _Logits = {}

    def recording(
        logits: torch.Tensor | npt.NDArray[np.float32], sequences: list[Sequence], masks: Words | None = None
    ) -> list[Sampled]:
        for row, seq in zip(logits, sequences, strict=False):
            seen[seq.request_id, len(seq.tokens)] = torch.as_tensor(row).clone()
        return sample(logits, sequences, masks)

    with (
        mock.patch.object(runner_module, "sample", recording),
        mock.patch.object(fused_runner_module, "sample", recording),
    ):
        yield seen


def weights_of(name: str) -> Weights:
    spec = SPECS[name]
    if name not in _weights:
        placement = launch_placement(1, spec.moe_layers, spec.moe.experts, 0)
        _weights[name] = dummy_weights(spec, placement)
    return _weights[name]


_weights: dict[str, Weights] = {}
_alone: dict[str, _Logits] = {}


def alone(name: str) -> _Logits:
    """The target by itself, its prompt in one chunk."""
    if name not in _alone:
        spec = SPECS[name]
        limits = EngineLimits(max_model_len=400, max_num_batched_tokens=200, num_pages=200)
        runner = solo_runner(spec, limits=limits, weights=weights_of(name))
        runner.add(assign(TARGET, TARGET_PROMPT, max_tokens=NEW_TOKENS))
        with recorded_logits() as seen:
            drain(runner)
        _alone[name] = seen
    return _alone[name]


def assert_same(seen: _Logits, expected: _Logits) -> None:
    for (request, known), row in seen.items():
        if request == TARGET:
            assert torch.equal(row, expected[TARGET, known]), f"logits after {known} tokens differ"


@settings(max_examples=20, deadline=None)
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
    expected = alone(name)
    emitted = [int(expected[TARGET, len(TARGET_PROMPT) + i].argmax()) for i in range(replayed)]
    limits = EngineLimits(400, 16, budget, page_size, num_pages=4000 // page_size)
    runner = solo_runner(SPECS[name], limits=limits, weights=weights_of(name))
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


@pytest.mark.parametrize("name", sorted(SPECS))
def test_every_prefix_gives_the_same_logits_in_prefill_and_in_decode(name: str) -> None:
    """One chunk of n tokens against one token at a time, over two key blocks."""
    limits = EngineLimits(max_model_len=400, max_num_batched_tokens=200, num_pages=200)
    prompt = [*TARGET_PROMPT, *TARGET_PROMPT][:150]
    runner = solo_runner(SPECS[name], limits=limits, weights=weights_of(name))
    runner.add(assign(TARGET, prompt[:1], max_tokens=149))
    with (
        recorded_logits() as decoded,
        mock.patch.object(runner_module, "sample", _forced(prompt)),
    ):
        drain(runner)
    for length in (1, 2, 3, 16, 17, 127, 128, 129, 140):
        runner.add(assign(TARGET, prompt[:length], max_tokens=1))
        with recorded_logits() as prefilled:
            drain(runner)
        assert torch.equal(prefilled[TARGET, length], decoded[TARGET, length]), length


def _forced(prompt: list[int]) -> Callable[[torch.Tensor, list[Sequence]], list[Sampled]]:
    """A sampler that reads the prompt out, recording like `recorded_logits`."""
    recording: Callable[[torch.Tensor, list[Sequence]], list[Sampled]] = vars(runner_module)["sample"]

    def forced(logits: torch.Tensor, sequences: list[Sequence], masks: Words | None = None) -> list[Sampled]:
        recording(logits, sequences)
        return [Sampled(prompt[len(seq.tokens)]) for seq in sequences]

    return forced


@settings(max_examples=60, deadline=None)
@given(
    tiles=st.integers(1, 5),
    row=st.integers(0, ROWS - 1),
    width=st.sampled_from([40, 64, 128, 200]),
    seed=st.integers(0),
)
def test_row_operations_do_not_see_other_rows(tiles: int, row: int, width: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed % 2**63)
    one = torch.randn(width, generator=generator)
    scales = 10.0 ** torch.randint(-3, 4, (ROWS * tiles, 1), generator=generator)
    x = torch.randn(ROWS * tiles, width, generator=generator) * scales
    first, last = torch.zeros(ROWS, width), x.clone()
    position = ROWS * (tiles - 1) + row
    first[0], last[position] = one, one
    weight, matrix = torch.randn(width, generator=generator), torch.randn(width, 72, generator=generator)
    rope = Rope(Rotary(width, 1e4), 50, torch.device("cpu"))
    angles = torch.full((ROWS,), 33), torch.full((ROWS * tiles,), 33)

    operations: dict[str, Callable[[torch.Tensor, int], torch.Tensor]] = {
        "linear": lambda x, _: linear(x, matrix),
        "rms_norm": lambda x, _: torch.nn.functional.rms_norm(x, weight.shape, weight, 1e-6),
        "softmax": lambda x, _: torch.softmax(x, -1),
        "topk": lambda x, _: torch.topk(x, 3).values,
        "rope": lambda x, i: rope.rotate(x.unsqueeze(1), *rope.at(angles[i])),
        "silu": lambda x, _: torch.nn.functional.silu(x[:, : width // 2]),
    }
    for name, operation in operations.items():
        assert torch.equal(operation(first, 0)[0], operation(last, 1)[position]), name


@settings(max_examples=10, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 60), st.floats(0, 2), st.floats(0.1, 1)), min_size=1, max_size=4))
def test_a_poisoned_step_leaves_no_trace(requests: list[tuple[int, float, float]]) -> None:
    """Every second step is poisoned, and what the experts returned was garbage."""

    def run(poisoned: bool) -> dict[int, list[int]]:
        exchange = SoloExchange(TINY.moe.experts)
        runner = solo_runner(exchange=exchange, weights=weights_of("tiny"))
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
            assert not (spoil and result.tokens)
            for token in result.tokens:
                out[token.request_id].append(token.token)
            step += 1
        return out

    assert run(poisoned=True) == run(poisoned=False)


def test_pages_of_a_cancelled_poisoned_request_are_clean() -> None:
    exchange = SoloExchange(TINY.moe.experts)
    runner = solo_runner(
        exchange=exchange, weights=weights_of("tiny"), limits=EngineLimits(64, 2, 16, num_pages=4)
    )
    runner.add(assign(1, list(range(60)), max_tokens=2))
    for step in range(3):
        exchange.garbage, exchange.poison = True, frozenset({1})
        runner.run_step(step, schedule=True)
    runner.cancel(1)
    fresh = solo_runner(weights=weights_of("tiny"))
    for each in (runner, fresh):
        each.add(assign(2, [9, 8, 7], max_tokens=20))
    assert ids(drain(runner)[2]) == ids(drain(fresh)[2])
