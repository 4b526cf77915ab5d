"""The device's sampler against the processor's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_ep.engine.ops_cuda import draws as draws_module
from elastic_ep.engine.ops_cuda.draws import Draws
from elastic_ep.engine.sampler import Sampled, key_state, sample
from elastic_ep.engine.sampler import gumbel as on_processor
from elastic_ep.engine.scheduler import Sequence
from elastic_ep.guided.text import Words
from elastic_ep.wire.messages import SamplingParams
from tests.engine.test_sampler import VOCAB, mask_of, masks, sequence, sequences, tokens

CPU = torch.device("cpu")


def draw(
    logits: torch.Tensor, batch: list[Sequence], rows: list[int] | None = None, masks: Words | None = None
) -> list[Sampled]:
    words = None if masks is None else torch.from_numpy(masks.view(np.int32))
    return Draws(batch, CPU, rows).run(logits, words).to_host().sampled(batch)


def assert_alike(got: list[Sampled], expected: list[Sampled]) -> None:
    for one, other in zip(got, expected, strict=True):
        assert (one.token, [top.token for top in one.top]) == (other.token, [top.token for top in other.top])
        assert (one.logprob is None) == (other.logprob is None)
        assert one.logprob == pytest.approx(other.logprob)
        assert [top.logprob for top in one.top] == pytest.approx([top.logprob for top in other.top])


@settings(max_examples=300, deadline=None)
@given(st.lists(sequences, min_size=1, max_size=6), st.integers(0, 2**32), st.booleans())
def test_draws_are_those_of_the_processor(batch: list[Sequence], seed: int, ties: bool) -> None:
    logits = torch.randn(len(batch) + 2, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    if ties:
        logits = logits.round()
    assert_alike(draw(logits, batch), sample(logits, batch))


@settings(max_examples=80, deadline=None)
@given(st.lists(st.tuples(sequences, masks), min_size=1, max_size=6), st.integers(0, 2**32))
def test_what_masks_leave_out_is_left_out_as_on_the_processor(
    asked: list[tuple[Sequence, set[int]]], seed: int
) -> None:
    batch = [one for one, _ in asked]
    words = np.concatenate([mask_of(may) for _, may in asked])
    logits = torch.randn(len(batch) + 2, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3
    got = draw(logits, batch, masks=words)
    assert_alike(got, sample(logits, batch, words))
    assert all(one.token in may for one, (_, may) in zip(got, asked, strict=True))


@settings(deadline=None)
@given(st.lists(st.tuples(tokens, st.none() | st.integers(0, 5)), min_size=1, max_size=5), st.integers(0, 99))
def test_log_probabilities_are_those_of_the_processor(asked: list[tuple[int, int | None]], seed: int) -> None:
    logits = torch.randn(len(asked), VOCAB, generator=torch.Generator().manual_seed(seed)).round()
    batch = [
        sequence(SamplingParams(9, temperature=float(token % 2), logprobs=wanted), [token], [], seed, 0)
        for token, wanted in asked
    ]
    assert_alike(draw(logits, batch), sample(logits, batch))


def test_rows_are_the_ones_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where they are worked on one at a time."""
    monkeypatch.setattr(draws_module, "_AT_ONCE", 1)
    params = SamplingParams(9, temperature=1.0, top_p=0.9, logprobs=2, presence_penalty=0.5)
    batch = [sequence(params, [1], [seed, 3], seed, 0) for seed in range(3)]
    logits = torch.randn(6, VOCAB, generator=torch.Generator().manual_seed(1))
    assert_alike(draw(logits, batch, [4, 0, 5]), sample(logits[[4, 0, 5]], batch))
    words = np.concatenate([mask_of({1, 2}), mask_of({33, 34}), mask_of(range(VOCAB))])
    assert_alike(draw(logits, batch, [4, 0, 5], words), sample(logits[[4, 0, 5]], batch, words))


def test_the_noise_has_the_bits_of_the_processors_up_to_the_logarithm() -> None:
    keys = [(0, 0, 0), (2**64, 5, 3), (-1, 1, 2**40), (2**63, 0, 7)]
    states = np.array([key_state(*key) for key in keys], np.uint64).view(np.int64)
    noise = draws_module.gumbel(torch.from_numpy(states), torch.arange(4000)).numpy()
    expected = on_processor(keys, 4000)
    assert np.abs(noise - expected).max() <= 4 * np.spacing(math.e**3)


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1e-6, 1e-4, 1e308])
@pytest.mark.parametrize("penalty", [1e-308, 1.0, 1e308])
def test_extreme_numbers_are_harmless(temperature: float, penalty: float) -> None:
    params = SamplingParams(
        max_tokens=1, temperature=temperature, repetition_penalty=penalty, top_p=1e-9, min_p=1.0
    )
    batch = [sequence(params, [1, 2], [3], 0, 0)]
    logits = torch.randn(1, VOCAB) * 50
    assert_alike(draw(logits, batch), sample(logits, batch))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_a_gpu_draws_what_the_processor_draws(rows: int) -> None:
    """Of a vocabulary that is worked on some rows at a time."""
    kinds = [
        {"temperature": 0.7},
        {"temperature": 0.7, "top_k": 20, "top_p": 0.8, "logprobs": 3},
        {"temperature": 1.0, "min_p": 0.01, "presence_penalty": 0.5, "repetition_penalty": 1.1},
        {"logprobs": 5},
        {},
    ]
    batch = [
        sequence(SamplingParams(9, **kinds[row % len(kinds)]), [row], [row, 7], row, 0)  # type: ignore[arg-type]  # of any field
        for row in range(rows)
    ]
    logits = torch.randn(rows, 151936, generator=torch.Generator().manual_seed(rows)) * 3
    device = torch.device("cuda")
    drawn = Draws(batch, device).run(logits.to(device)).to_host()
    torch.cuda.synchronize()
    assert_alike(drawn.sampled(batch), sample(logits, batch))
