"""From logits to tokens. The noise at a position is a function of (seed, choice, position) and nothing else, so a
stream that moves to another rank, or is computed anew, goes on with the same tokens.

Order as in vLLM: log-probabilities of the raw logits; logit_bias; repetition, presence and frequency penalties;
tokens that may not be picked, at last those outside a grammar; temperature; min_p; top_k; top_p. Arithmetic on
sampled rows is float64 and row by row independent.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Seq
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from elastic_ep.engine.scheduler import Sequence
from elastic_ep.guided.text import Words
from elastic_ep.wire.messages import SamplingParams, TopLogprob

_Floats = npt.NDArray[np.float64]
_Words = npt.NDArray[np.uint64]

GOLDEN = 0x9E3779B97F4A7C15
MIX_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
"""splitmix64's (Steele, Lea, Flood 2014), as is the increment above."""
_MASK = (1 << 64) - 1
_GREEDY_BELOW = 1e-5
"""A temperature so low is greedy (vLLM's bound): dividing by it would overflow."""
LARGEST = 1e30
HELD_BACK = -2 * LARGEST
"""The score of a token that would end a sequence too early."""
FORBIDDEN = -4 * LARGEST
"""That of one that is not allowed: less, so that of tokens that are all held back an allowed one is picked."""
OUTSIDE = -8 * LARGEST
"""That of one with which a text would leave its grammar: the least, as that is never picked, whatever else is asked."""


class Sampled(NamedTuple):
    token: int
    logprob: float | None = None
    top: tuple[TopLogprob, ...] = ()


def sample(
    logits: torch.Tensor | npt.NDArray[np.float32], sequences: Seq[Sequence], masks: Words | None = None
) -> list[Sampled]:
    """The next token of each sequence, from the first rows of logits [>= len(sequences), V] float32.

    `masks` [len(sequences), words] if any of them has a grammar: see guided/text.py.
    """
    rows_of_all = logits if isinstance(logits, np.ndarray) else logits.numpy(force=True)
    raw = rows_of_all[: len(sequences)]
    if masks is None and all(map(_is_plain_greedy, sequences)):
        return list(map(Sampled, raw.argmax(axis=-1).tolist()))
    scores = _penalised(raw, sequences)
    if masks is not None:
        _leave_out(scores, masks)
    tokens = scores.argmax(axis=-1)
    rows = [row for row, seq in enumerate(sequences) if not is_greedy(seq.params)]
    if rows:
        chosen = [sequences[row] for row in rows]
        tokens[rows] = _draw(scores[rows], chosen)
    return [
        _with_logprobs(int(token), row, seq.params)
        for token, row, seq in zip(tokens, raw, sequences, strict=True)
    ]


def gumbel(keys: Seq[tuple[int, int, int]], vocab_size: int) -> _Floats:
    """Standard Gumbel noise [len(keys), vocab_size] for keys (seed, choice, position).

    Counter-based: word v of a key is splitmix64's v-th output from a state that hashes the key.
    """
    state = np.array([key_state(*key) for key in keys], dtype=np.uint64)
    counter = np.arange(1, vocab_size + 1, dtype=np.uint64) * np.uint64(GOLDEN)
    words = _mix(state[:, None] + counter)
    uniform = ((words >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53
    return -np.log(-np.log(uniform))


def key_state(seed: int, choice: int, position: int) -> int:
    """What the noise of a position begins with: 64 bits."""
    state = 0
    for part in (seed, choice, position):
        state = _mix_word((state + GOLDEN + part) & _MASK)
    return state


def _mix_word(x: int) -> int:
    """`_mix` of one word, which an array would make slow."""
    x = (x ^ (x >> 30)) * MIX_MULTIPLIERS[0] & _MASK
    x = (x ^ (x >> 27)) * MIX_MULTIPLIERS[1] & _MASK
    return x ^ (x >> 31)


def _mix(x: _Words) -> _Words:
    """splitmix64's finaliser. Unsigned arithmetic wraps."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(MIX_MULTIPLIERS[0])
    x = (x ^ (x >> np.uint64(27))) * np.uint64(MIX_MULTIPLIERS[1])
    return x ^ (x >> np.uint64(31))


def is_greedy(params: SamplingParams) -> bool:
    return params.temperature < _GREEDY_BELOW


def is_plain_greedy(params: SamplingParams) -> bool:
    limits = params.min_tokens, params.logit_bias, params.allowed_token_ids, params.bad_words
    changes = any(limits) or has_penalties(params)
    return is_greedy(params) and params.logprobs is None and params.grammar is None and not changes


def _is_plain_greedy(sequence: Sequence) -> bool:
    """Asked for each token, so it is kept."""
    if sequence.plain_greedy is None:
        sequence.plain_greedy = is_plain_greedy(sequence.params)
    return sequence.plain_greedy


def held_back(sequence: Sequence) -> list[int]:
    """Tokens that would end it before it has `min_tokens`, or would complete a word that it may not have."""
    params = sequence.params
    held = set(sequence.stops) if sequence.output_len < params.min_tokens else set()
    if params.bad_words:
        output = sequence.tokens[sequence.prompt_len :]
        for *begin, last in params.bad_words:
            if output[len(output) - len(begin) :] == begin:
                held.add(last)
    return sorted(held)


def has_penalties(params: SamplingParams) -> bool:
    return params.repetition_penalty != 1 or params.presence_penalty != 0 or params.frequency_penalty != 0


def _penalised(raw: npt.NDArray[np.float32], sequences: Seq[Sequence]) -> _Floats:
    scores = raw.astype(np.float64)
    for row, seq in zip(scores, sequences, strict=True):
        for token, add in seq.params.logit_bias:
            row[token] += add
        if has_penalties(seq.params):
            _penalise(row, seq)
        row[held_back(seq)] = HELD_BACK
        if seq.params.allowed_token_ids:
            allowed = list(seq.params.allowed_token_ids)
            kept = row[allowed]
            row.fill(FORBIDDEN)
            row[allowed] = kept
    return scores


def _leave_out(scores: _Floats, masks: Words) -> None:
    """Scores [R, V], in place."""
    allowed = np.unpackbits(masks.view(np.uint8), axis=1, count=scores.shape[1], bitorder="little")
    scores[allowed == 0] = OUTSIDE


def _penalise(row: _Floats, seq: Sequence) -> None:
    """row [V], in place."""
    params = seq.params
    seen = np.unique(seq.tokens)
    with np.errstate(over="ignore"):
        repeated = np.where(
            row[seen] > 0, row[seen] / params.repetition_penalty, row[seen] * params.repetition_penalty
        )
    row[seen] = np.clip(repeated, -LARGEST, LARGEST)
    output, counts = np.unique(seq.tokens[seq.prompt_len :], return_counts=True)
    if len(output):
        row[output] -= params.frequency_penalty * counts + params.presence_penalty


def _draw(scores: _Floats, sequences: Seq[Sequence]) -> npt.NDArray[np.int64]:
    """Gumbel-max: the argmax of log-probability plus noise is a sample."""
    column = _column(sequences)
    scores = (scores - scores.max(axis=-1, keepdims=True)) / column("temperature")
    min_p = column("min_p")
    if (min_p > 0).any():
        with np.errstate(divide="ignore"):
            floor = np.log(min_p)
        scores[scores < floor] = -np.inf
    top_k, top_p = column("top_k"), column("top_p")
    if (top_k > 0).any() or (top_p < 1).any():
        scores = _cut_tail(scores, top_k, top_p)
    noise = gumbel([(seq.seed, seq.choice, len(seq.tokens)) for seq in sequences], scores.shape[-1])
    drawn: npt.NDArray[np.int64] = (scores + noise).argmax(axis=-1)
    return drawn


def _column(sequences: Seq[Sequence]) -> Callable[[str], _Floats]:
    def column(name: str) -> _Floats:
        return np.array([[getattr(seq.params, name)] for seq in sequences], dtype=np.float64)

    return column


def _cut_tail(scores: _Floats, top_k: _Floats, top_p: _Floats) -> _Floats:
    """Keep the `top_k` best (0: all), then the smallest set of the best that has at least `top_p` of the mass.

    Scores [R, V]; `top_k`, `top_p` [R, 1]. Ties go to the lower token id.
    """
    order = np.argsort(-scores, axis=-1, kind="stable")
    ranked = np.take_along_axis(scores, order, axis=-1)
    ranked[(top_k > 0) & (np.arange(scores.shape[-1]) >= top_k)] = -np.inf
    mass = np.exp(ranked - ranked[:, :1])
    before = np.cumsum(mass, axis=-1) - mass
    cut = (top_p < 1) & (before >= top_p * mass.sum(axis=-1, keepdims=True))
    cut[:, 0] = False
    ranked[cut] = -np.inf
    kept = np.empty_like(ranked)
    np.put_along_axis(kept, order, ranked, axis=-1)
    return kept


def _with_logprobs(token: int, raw: npt.NDArray[np.float32], params: SamplingParams) -> Sampled:
    if params.logprobs is None:
        return Sampled(token)
    wide = raw.astype(np.float64)
    top = wide.max()
    logprobs = wide - (top + np.log(np.exp(wide - top).sum()))
    best = np.argsort(-logprobs, kind="stable")[: params.logprobs]
    alternatives = tuple(TopLogprob(int(index), float(logprobs[index])) for index in best)
    return Sampled(token, float(logprobs[token]), alternatives)
