"""Tokens drawn on a GPU are those that the processor draws."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from elastic_ep.engine.ops_cuda.draws import Draws
from elastic_ep.engine.ops_cuda.kernels import draw_tokens as module
from elastic_ep.engine.sampler import sample
from elastic_ep.engine.scheduler import Sequence
from elastic_ep.guided.text import Words
from elastic_ep.wire.messages import SamplingParams

VOCABULARY = 20_000
"""Several parts, the last of them short."""
KINDS = {
    "greedy": [SamplingParams(9)],
    "sampled": [SamplingParams(9, temperature=0.7), SamplingParams(9, temperature=1.3, min_p=0.02)],
    "few": [
        SamplingParams(9, temperature=0.8, top_k=20, top_p=0.95),
        SamplingParams(9, temperature=1.0, top_k=3),
    ],
}
KINDS["mixed"] = KINDS["greedy"] + KINDS["sampled"]
KINDS["few and greedy"] = KINDS["greedy"] + KINDS["few"]


def batch(kind: str, count: int) -> list[Sequence]:
    params = KINDS[kind]
    return [
        Sequence(row, [1] * (row + 2), 1, params[row % len(params)], 7 * row, row % 3) for row in range(count)
    ]


def some_masks(count: int, dice: random.Random) -> Words:
    """Rows that leave few tokens, one, or nearly all."""
    words = np.zeros((count, -(-VOCABULARY // 32)), np.uint32)
    for row in words:
        if dice.random() < 0.3:
            row[:] = np.uint32(0xFFFFFFFF)
        for _ in range(dice.choice([1, 2, 50])):
            token = dice.randrange(VOCABULARY)
            row[token // 32] ^= np.uint32(1 << token % 32)
        row[VOCABULARY // 64] |= np.uint32(2)
    return words


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_as_on_the_processor(device: torch.device, kind: str, masked: bool, ties: bool) -> None:
    count = 5
    logits = torch.randn(count + 2, VOCABULARY, generator=torch.Generator().manual_seed(len(kind))) * 3
    logits = logits.round() if ties else logits
    chosen, rows = batch(kind, count), [3, 0, 6, 2, 5]
    masks = some_masks(count, random.Random(kind)) if masked else None
    words = None if masks is None else torch.from_numpy(masks.view(np.int32))
    drawn = Draws(chosen, device, rows).run(logits.to(device), words).to_host()
    if device.type == "cuda":
        torch.cuda.synchronize()
    assert drawn.sampled(chosen) == sample(logits[rows], chosen, masks)


def test_a_row_of_nothing_has_a_token_all_the_same(device: torch.device) -> None:
    """A poisoned step's logits may be anything; what they give is thrown away."""
    logits = torch.full((2, VOCABULARY), float("nan"))
    logits[1] = -float("inf")
    ones = torch.ones(2, 3, dtype=torch.float64, device=device)
    zeros = torch.zeros(2, dtype=torch.int64, device=device)
    tokens = module.draw_tokens(logits.to(device), torch.arange(2, device=device), zeros, ones)
    assert all(0 <= token < VOCABULARY for token in tokens.tolist())
