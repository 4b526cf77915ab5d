"""The sampler against a naive reference, one row and one token at a time."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_ep.engine.sampler import gumbel, sample
from elastic_ep.engine.scheduler import Sequence
from elastic_ep.guided.text import Words
from elastic_ep.wire.messages import Bias, SamplingParams

VOCAB = 37


def sequence(
    params: SamplingParams,
    prompt: list[int],
    output: list[int],
    seed: int,
    choice: int,
    stops: Collection[int] = (),
) -> Sequence:
    return Sequence(1, [*prompt, *output], len(prompt), params, seed, choice, stops=frozenset(stops))


def completing(seq: Sequence) -> set[int]:
    """Tokens with which the output would end with a bad word."""
    output = tuple(seq.tokens[seq.prompt_len :])
    words = seq.params.bad_words
    return {word[-1] for word in words if (*output, word[-1])[-len(word) :] == word}


def kept_scores(logits: list[float], seq: Sequence) -> dict[int, float]:
    """What may be drawn, with its scaled score, by the definitions."""
    params = seq.params
    scores = list(logits)
    for token, add in params.logit_bias:
        scores[token] += add
    counts = Counter(seq.tokens[seq.prompt_len :])
    for token in range(VOCAB):
        if token in seq.tokens:
            penalty = params.repetition_penalty
            scores[token] = scores[token] / penalty if scores[token] > 0 else scores[token] * penalty
        if counts[token]:
            scores[token] -= params.frequency_penalty * counts[token] + params.presence_penalty
    for token in seq.stops if seq.output_len < params.min_tokens else ():
        scores[token] = -2e30
    for token in completing(seq):
        scores[token] = -2e30
    for token in range(VOCAB):
        if params.allowed_token_ids and token not in params.allowed_token_ids:
            scores[token] = -4e30
    if params.temperature == 0:
        return {max(range(VOCAB), key=lambda token: (scores[token], -token)): 0.0}
    largest = max(scores)
    scaled = {token: (score - largest) / params.temperature for token, score in enumerate(scores)}
    best = 0.0
    kept = {t: s for t, s in scaled.items() if params.min_p == 0 or s >= best + math.log(params.min_p)}
    ranked = sorted(kept, key=lambda token: (-kept[token], token))
    if params.top_k:
        ranked = ranked[: params.top_k]
    mass = sum(math.exp(kept[token] - best) for token in ranked)
    nucleus: list[int] = []
    reached = 0.0
    for token in ranked:
        if nucleus and params.top_p < 1 and reached >= params.top_p * mass:
            break
        nucleus.append(token)
        reached += math.exp(kept[token] - best)
    return {token: kept[token] for token in nucleus}


def naive(logits: list[float], seq: Sequence) -> int:
    kept = kept_scores(logits, seq)
    noise = gumbel([(seq.seed, seq.choice, len(seq.tokens))], VOCAB)[0]
    return max(kept, key=lambda token: (kept[token] + noise[token], -token))


tokens = st.integers(0, VOCAB - 1)
sampling = st.builds(
    SamplingParams,
    max_tokens=st.just(9),
    temperature=st.sampled_from([0.0, 0.0, 0.3, 1.0, 2.0]),
    top_p=st.sampled_from([1.0, 0.05, 0.5, 0.9]),
    top_k=st.sampled_from([0, 1, 3, 20, 1000]),
    min_p=st.sampled_from([0.0, 0.02, 0.3]),
    repetition_penalty=st.sampled_from([1.0, 0.7, 1.3]),
    presence_penalty=st.sampled_from([0.0, -1.0, 0.8]),
    frequency_penalty=st.sampled_from([0.0, 0.4, -0.6]),
    min_tokens=st.sampled_from([0, 0, 1, 5, 9]),
    logit_bias=st.dictionaries(tokens, st.sampled_from([-100.0, -1.5, 3.0, 100.0]), max_size=3).map(
        lambda biases: tuple(Bias(*one) for one in biases.items())
    ),
    allowed_token_ids=st.just(()) | st.lists(tokens, unique=True, max_size=4).map(tuple),
    bad_words=st.just(())
    | st.lists(st.lists(tokens, min_size=1, max_size=2).map(tuple), max_size=3).map(tuple),
)
sequences = st.builds(
    sequence,
    sampling,
    st.lists(tokens, min_size=1, max_size=10),
    st.lists(tokens, max_size=10),
    st.integers(-(2**63), 2**64),
    st.integers(0, 5),
    st.just(()) | st.sets(tokens, max_size=3),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(sequences, min_size=1, max_size=6), st.integers(0, 2**32))
def test_matches_the_definitions(batch: list[Sequence], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(batch) + 2, VOCAB, generator=generator) * 3
    got = [one.token for one in sample(logits, batch)]
    assert got == [naive(row, seq) for row, seq in zip(logits.tolist(), batch, strict=False)]


@settings(deadline=None)
@given(st.lists(sequences, min_size=2, max_size=6), st.integers(0, 2**32))
def test_neighbours_do_not_matter(batch: list[Sequence], seed: int) -> None:
    logits = torch.randn(len(batch), VOCAB, generator=torch.Generator().manual_seed(seed))
    together = sample(logits, batch)
    assert together == [sample(logits[i : i + 1], [seq])[0] for i, seq in enumerate(batch)]


@settings(max_examples=200, deadline=None)
@given(sequences, st.integers(0, 2**32))
def test_nothing_is_picked_that_may_not_be(seq: Sequence, seed: int) -> None:
    """Whatever else is asked for, as long as anything may."""
    params = seq.params
    may = set(params.allowed_token_ids or range(VOCAB))
    held = completing(seq) | (seq.stops if seq.output_len < params.min_tokens else frozenset())
    may = may - held or may
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(seed)) * 1e6
    assert sample(logits, [seq])[0].token in may


def mask_of(may: Collection[int]) -> Words:
    """[1, words]."""
    words = np.zeros((1, -(-VOCAB // 32)), np.uint32)
    for token in may:
        words[0, token >> 5] |= np.uint32(1 << (token & 31))
    return words


masks = st.sets(tokens, min_size=1)


@settings(max_examples=200, deadline=None)
@given(sequences, masks, st.integers(0, 2**32))
def test_a_mask_leaves_out_all_others_whatever_else_is_asked(seq: Sequence, may: set[int], seed: int) -> None:
    """And among those that may come is as a list of those allowed."""
    logits = torch.randn(1, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    got = sample(logits, [seq], mask_of(may))[0]
    assert got.token in may
    if not seq.params.allowed_token_ids:
        seq.params = replace(seq.params, allowed_token_ids=tuple(may))
        assert got == sample(logits, [seq])[0]


@pytest.mark.parametrize("params", [{}, {"presence_penalty": 1e-9}])
def test_greedy_takes_the_lowest_of_equals(params: dict[str, Any]) -> None:
    logits = torch.tensor([[0.0, 5.0, 5.0, 1.0], [7.0, 7.0, 7.0, 7.0]])
    greedy = SamplingParams(max_tokens=1, **params)
    seqs = [Sequence(i, [3], 1, greedy, 0, 0) for i in range(2)]
    assert [one.token for one in sample(logits, seqs)] == [1, 0]


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-6, 1e-4, 1e308])
@pytest.mark.parametrize("penalty", [1e-308, 1.0, 1e308])
def test_extreme_numbers_are_harmless(temperature: float, penalty: float) -> None:
    params = SamplingParams(
        max_tokens=1, temperature=temperature, repetition_penalty=penalty, top_p=1e-9, min_p=1.0
    )
    one = sample(torch.randn(1, VOCAB) * 50, [sequence(params, [1, 2], [3], 0, 0)])
    assert 0 <= one[0].token < VOCAB


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logprobs_are_of_the_raw_logits(temperature: float) -> None:
    params = SamplingParams(max_tokens=1, temperature=temperature, logprobs=3, frequency_penalty=2.0, top_k=1)
    logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(3))
    seqs = [sequence(params, [1], [2, 2], 5, 0), sequence(SamplingParams(max_tokens=1), [1], [], 0, 0)]
    got, plain = sample(logits, seqs)
    expected = torch.log_softmax(logits[0].double(), -1)
    best = torch.topk(expected, 3)
    assert [top.token for top in got.top] == best.indices.tolist()
    assert [top.logprob for top in got.top] == pytest.approx(best.values.tolist())
    assert got.logprob == pytest.approx(float(expected[got.token]))
    assert plain.logprob is None
    assert plain.top == ()


def test_noise_depends_on_each_part_of_its_key_and_on_nothing_else() -> None:
    keys = [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (-1, 0, 0), (2**63, 0, 0)]
    noise = gumbel(keys, 1000)
    for row, key in zip(noise, keys, strict=True):
        assert np.array_equal(row, gumbel([key], 1000)[0])
        assert np.array_equal(row[:77], gumbel([key], 77)[0])
    assert len({row.tobytes() for row in noise}) == len(keys)


def test_noise_is_gumbel() -> None:
    noise = np.sort(gumbel([(3, 0, position) for position in range(50)], 2000).reshape(-1))
    expected = -np.log(-np.log((np.arange(len(noise)) + 0.5) / len(noise)))
    middle = slice(len(noise) // 1000, -len(noise) // 1000)
    assert np.abs(noise[middle] - expected[middle]).max() < 0.12
    drift = np.exp(-np.exp(-noise)) - (np.arange(len(noise)) + 0.5) / len(noise)
    assert np.abs(drift).max() < 1.63 / math.sqrt(len(noise))  # Kolmogorov-Smirnov, 1 %


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0]])
    params = SamplingParams(max_tokens=1, temperature=1.0)
    counts = np.zeros(4)
    draws = 20000
    for start in range(0, draws, 1000):
        batch = [Sequence(0, [0], 1, params, seed, 0) for seed in range(start, start + 1000)]
        for one in sample(logits.expand(1000, 4), batch):
            counts[one.token] += 1
    expected = torch.softmax(logits[0].double(), -1).numpy() * draws
    assert ((counts - expected) ** 2 / expected).sum() < 16.3  # chi-squared, 3 degrees, 0.1 %
