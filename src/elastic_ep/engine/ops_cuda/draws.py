"""The sampler on the device: what sampler.py does, in the same order and with the same noise, queued behind a step.

With a vocabulary of 150,000 the processor needs a second for 16 sequences with top_p; a step takes milliseconds.
Arithmetic is float64 and row by row independent; logarithms may differ from numpy's in the last bit, so what a stream
draws is the same on every GPU, and the same as on a processor but for ties within that.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch

from elastic_ep.engine.ops_cuda.kernels.draw_tokens import draw_tokens
from elastic_ep.engine.sampler import (
    FORBIDDEN,
    GOLDEN,
    HELD_BACK,
    LARGEST,
    MIX_MULTIPLIERS,
    OUTSIDE,
    Sampled,
    has_penalties,
    held_back,
    is_greedy,
    key_state,
)
from elastic_ep.engine.scheduler import Sequence
from elastic_ep.kernel import INTERPRETED
from elastic_ep.wire.messages import SamplingParams, TopLogprob

MOST_RANKED = 1024
"""Of a larger top_k the whole vocabulary is ranked."""
_LAST_PLACE = 0xFFFFFFFF
_AT_ONCE = 4 << 20
"""Elements of a temporary: rows are worked on some at a time, so that a large vocabulary does not need gigabytes."""
WORKING_BYTES = 10 * 8 * _AT_ONCE
"""Of all temporaries that live at once."""


@dataclass(frozen=True, slots=True)
class Alternatives:
    """The log-probability of each token [n], and the best tokens [n, k] with theirs; float64."""

    own: torch.Tensor
    best: torch.Tensor
    logprobs: torch.Tensor


@dataclass(frozen=True, slots=True)
class Drawn:
    """`tokens` [n] int64; `alternatives` if any of the sequences asks for them, as many as any of them asks for."""

    tokens: torch.Tensor
    alternatives: Alternatives | None = None

    def to_host(self) -> Drawn:
        """Queued: the values are there when the device has come so far."""

        def copy(values: torch.Tensor) -> torch.Tensor:
            return values.to("cpu", non_blocking=True)  # into pinned memory

        more = self.alternatives
        if more is None:
            return Drawn(copy(self.tokens))
        return Drawn(copy(self.tokens), Alternatives(copy(more.own), copy(more.best), copy(more.logprobs)))

    def sampled(self, sequences: Seq[Sequence]) -> list[Sampled]:
        """On the host: what each of the sequences gets to know."""
        tokens, more = self.tokens.tolist(), self.alternatives
        if more is None:
            return [Sampled(token) for token in tokens]
        rows = zip(tokens, more.own.tolist(), more.best.tolist(), more.logprobs.tolist(), strict=True)
        return [_sampled(*row, seq.params.logprobs) for row, seq in zip(rows, sequences, strict=True)]


def _sampled(token: int, own: float, best: list[int], logprobs: list[float], wanted: int | None) -> Sampled:
    if wanted is None:
        return Sampled(token)
    return Sampled(token, own, tuple(map(TopLogprob, best[:wanted], logprobs[:wanted])))


class Draws:
    """What to draw for `sequences`, whose logits are in these `rows`; the first ones if not given.

    Made before the step is launched, as it copies to the device; `run` only queues.
    """

    def __init__(self, sequences: Seq[Sequence], device: torch.device, rows: Seq[int] | None = None) -> None:
        self._masks: torch.Tensor | None = None
        params = [seq.params for seq in sequences]
        self._greedy = [is_greedy(one) for one in params]
        states = [key_state(seq.seed, seq.choice, len(seq.tokens)) for seq in sequences]
        whole = np.empty((2, len(params)), np.int64)  # all in one copy
        whole[0] = rows if rows is not None else range(len(sequences))
        whole[1] = np.array(states, np.uint64).view(np.int64)
        columns = np.array([_columns(one) for one in params], np.float64).reshape(len(params), 5)
        there = torch.from_numpy(np.concatenate([whole.ravel(), columns.view(np.int64).ravel()])).to(device)
        self._rows, self._states, numbers = there.split([len(params), len(params), 5 * len(params)])
        self._columns = numbers.view(torch.float64).view(len(params), 5)
        self._changes = [_Changes(seq, device) if _changes(seq) else None for seq in sequences]
        wanted = [one.logprobs for one in params if one.logprobs is not None]
        self._most_logprobs = max(wanted, default=None)
        self._floored = any(one.min_p > 0 for one in params)
        drawn = [one for one in params if not is_greedy(one)]
        self._cut = any(one.top_k > 0 or one.top_p < 1 for one in drawn)
        self._most = max([one.top_k for one in drawn], default=0)
        """Tokens of which one is drawn at most, if all say so."""
        self._few = 0 < self._most <= MOST_RANKED and all(one.top_k > 0 for one in drawn)

    def run(self, logits: torch.Tensor, masks: torch.Tensor | None = None) -> Drawn:
        """`logits` [>= n, V] float32; `masks` [n, words] int32 if any of the sequences has a grammar.

        Masks in pinned memory are copied behind what the device does: they may be computed as late as that.
        """
        self._masks = masks.to(logits.device, non_blocking=True) if masks is not None else None
        if self._most_logprobs is None and not any(self._changes):
            if not self._cut and (logits.is_cuda or INTERPRETED):
                settings = self._columns[:, [0, 1, 4]]
                return Drawn(draw_tokens(logits, self._rows, self._states, settings, self._masks))
            if self._cut and self._few:
                return Drawn(self._of_few(logits.index_select(0, self._rows)))
        logits = logits.index_select(0, self._rows)
        rows, vocabulary = logits.shape
        at_once = max(1, _AT_ONCE // vocabulary)
        parts = [self._part(logits, slice(row, row + at_once)) for row in range(0, rows, at_once)]
        tokens = torch.cat([part.tokens for part in parts])
        more = [part.alternatives for part in parts if part.alternatives is not None]
        if not more:
            return Drawn(tokens)
        own, best = torch.cat([part.own for part in more]), torch.cat([part.best for part in more])
        return Drawn(tokens, Alternatives(own, best, torch.cat([part.logprobs for part in more])))

    def _of_few(self, logits: torch.Tensor) -> torch.Tensor:
        """Where all that are drawn say a top_k: without ranking the vocabulary."""
        order = _largest(logits, self._masks, min(self._most, logits.shape[1]))
        scores = logits.gather(1, order).double()
        if self._masks is not None:
            scores.masked_fill_(_may_come(self._masks, order) == 0, OUTSIDE)
        temperature, floor, top_k, top_p, greedy = self._columns[:, :, None].unbind(dim=1)
        scaled = (scores - scores[:, :1]) / temperature
        scaled.masked_fill_(scaled < floor, -torch.inf)
        scaled = _without_tail(scaled, top_k, top_p)
        drawn = (scaled + gumbel(self._states, order)).argmax(dim=-1)
        return order.gather(1, torch.where(greedy[:, 0] > 0, 0, drawn)[:, None])[:, 0]

    def _part(self, logits: torch.Tensor, rows: slice) -> Drawn:
        raw = logits[rows].double()
        tokens = self._tokens(raw, rows)
        if self._most_logprobs is None:
            return Drawn(tokens)
        logprobs = raw - raw.logsumexp(dim=-1, keepdim=True)
        own = logprobs.gather(1, tokens[:, None])[:, 0]
        values, best = logprobs.sort(dim=-1, descending=True, stable=True)
        best, values = best[:, : self._most_logprobs], values[:, : self._most_logprobs]
        return Drawn(tokens, Alternatives(own, best, values))

    def _tokens(self, raw: torch.Tensor, rows: slice) -> torch.Tensor:
        scores = self._penalised(raw, rows)
        if all(self._greedy[rows]):
            return scores.argmax(dim=-1)
        temperature, floor, top_k, top_p, greedy = self._columns[rows, :, None].unbind(dim=1)
        scaled = (scores - scores.amax(dim=-1, keepdim=True)) / temperature
        if self._floored:
            scaled.masked_fill_(scaled < floor, -torch.inf)
        noise = gumbel(self._states[rows], torch.arange(scores.shape[-1], device=scores.device))
        if self._cut:
            scaled, order = _cut_tail(scaled, top_k, top_p)
            drawn = (scaled + noise.gather(1, order)).argmax(dim=-1, keepdim=True)
            drawn = order.gather(1, drawn)[:, 0]
        else:
            drawn = (scaled + noise).argmax(dim=-1)
        return torch.where(greedy[:, 0] > 0, scores.argmax(dim=-1), drawn)

    def _penalised(self, raw: torch.Tensor, rows: slice) -> torch.Tensor:
        changes = self._changes[rows]
        if not any(changes):
            return raw if self._masks is None else raw.masked_fill(self._forbidden(raw, rows), OUTSIDE)
        scores = raw.clone()
        for row, change in zip(scores, changes, strict=True):
            if change is not None:
                change.apply(row)
        if self._masks is not None:
            scores.masked_fill_(self._forbidden(scores, rows), OUTSIDE)
        return scores

    def _forbidden(self, scores: torch.Tensor, rows: slice) -> torch.Tensor:
        assert self._masks is not None
        return _outside(self._masks[rows], scores.shape[-1])


def _changes(sequence: Sequence) -> bool:
    params = sequence.params
    limited = params.logit_bias or params.allowed_token_ids or held_back(sequence)
    return bool(limited) or has_penalties(params)


class _Changes:
    """For one sequence: what is done to its logits. Only what it asks for is copied to the device."""

    def __init__(self, sequence: Sequence, device: torch.device) -> None:
        params = self._params = sequence.params
        self._bias = self._seen = self._held = self._allowed = None
        if params.logit_bias:
            self._bias = torch.tensor([token for token, _ in params.logit_bias]).to(device)
            self._add = torch.tensor([add for _, add in params.logit_bias], dtype=torch.float64).to(device)
        if has_penalties(params):
            seen, where = np.unique(sequence.tokens, return_inverse=True)
            counts = np.bincount(where[sequence.prompt_len :], minlength=len(seen))
            self._seen = torch.from_numpy(seen).to(device)
            self._counts = torch.from_numpy(counts.astype(np.float64)).to(device)
        if held := held_back(sequence):
            self._held = torch.tensor(held).to(device)
        if params.allowed_token_ids:
            self._allowed = torch.tensor(params.allowed_token_ids).to(device)

    def apply(self, row: torch.Tensor) -> None:
        """row [V] float64, in place."""
        if self._bias is not None:
            row[self._bias] += self._add
        if self._seen is not None:
            self._penalise(row, self._seen)
        if self._held is not None:
            row[self._held] = HELD_BACK
        if self._allowed is not None:
            kept = row[self._allowed]
            row.fill_(FORBIDDEN)
            row[self._allowed] = kept

    def _penalise(self, row: torch.Tensor, seen: torch.Tensor) -> None:
        params, of_seen = self._params, row[seen]
        repeated = torch.where(
            of_seen > 0, of_seen / params.repetition_penalty, of_seen * params.repetition_penalty
        )
        repeated.clamp_(-LARGEST, LARGEST)
        repeated -= params.frequency_penalty * self._counts + params.presence_penalty * (self._counts > 0)
        row[seen] = repeated


def _outside(masks: torch.Tensor, vocabulary: int) -> torch.Tensor:
    """Masks [n, words] int32 to [n, vocabulary] bool: tokens that may not come."""
    bits = masks[:, :, None] & _bits(masks.device)
    return bits.flatten(1)[:, :vocabulary] == 0


def _may_come(masks: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Of tokens [n, m] what masks [n, words] int32 say: 1 where one may come."""
    return (masks.gather(1, tokens // 32) >> (tokens % 32)) & 1


@cache
def _bits(device: torch.device) -> torch.Tensor:
    """Of a word [32] int32. Kept: every launch less is time of a step."""
    return torch.ones(32, dtype=torch.int32, device=device) << torch.arange(
        32, dtype=torch.int32, device=device
    )


def _columns(params: SamplingParams) -> tuple[float, ...]:
    """Temperature, least scaled score, top_k, top_p, greedy. A greedy row goes through the rest unharmed."""
    if is_greedy(params):
        return 1.0, -np.inf, 0.0, 1.0, 1.0
    floor = np.log(params.min_p) if params.min_p > 0 else -np.inf
    return params.temperature, floor, float(params.top_k), params.top_p, 0.0


def _largest(logits: torch.Tensor, masks: torch.Tensor | None, count: int) -> torch.Tensor:
    """The tokens [n, count] int64 with the largest logits [n, V] float32, the largest first, of equals the first; those
    outside of `masks` come last."""
    places = torch.arange(logits.shape[1], device=logits.device)
    bits = (logits + 0.0).view(torch.int32)  # no zero has a sign
    ranks = (bits ^ ((bits >> 31) & 0x7FFFFFFF)).long()
    if masks is not None:
        ranks.masked_fill_(_outside(masks, logits.shape[1]), -(1 << 31))
    keys = (ranks << 32) | (_LAST_PLACE - places)
    best: torch.Tensor = keys.topk(count, dim=-1).values
    return _LAST_PLACE - (best & _LAST_PLACE)


def gumbel(states: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """As in sampler.py: standard Gumbel noise [n, m] float64 for key states [n] and tokens [m] or [n, m], all int64.

    Words are unsigned there; here they are int64 with the same bits, and products wrap as well.
    """
    counter = (tokens + 1) * _signed(GOLDEN)
    words = states[:, None] + counter
    for shift, multiplier in zip((30, 27), MIX_MULTIPLIERS, strict=True):
        words = (words ^ _shifted(words, shift)) * _signed(multiplier)
    words = words ^ _shifted(words, 31)
    uniform = (_shifted(words, 11).double() + 0.5) * 2.0**-53
    return -torch.log(-torch.log(uniform))


def _signed(word: int) -> int:
    return word - (1 << 64) if word >> 63 else word


def _shifted(words: torch.Tensor, by: int) -> torch.Tensor:
    """To the right, with zeros coming in."""
    return (words >> by) & ((1 << (64 - by)) - 1)


def _cut_tail(
    scores: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As in sampler.py, but the scores [n, V] stay in order of rank; the second result says whose they are."""
    ranked, order = scores.sort(dim=-1, descending=True, stable=True)
    return _without_tail(ranked, top_k, top_p), order


def _without_tail(ranked: torch.Tensor, top_k: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """-inf in place of scores that top_k or top_p leave out; in place."""
    rank = torch.arange(ranked.shape[-1], device=ranked.device)
    ranked.masked_fill_((top_k > 0) & (rank >= top_k), -torch.inf)
    mass = torch.exp(ranked - ranked[:, :1])
    before = mass.cumsum(dim=-1) - mass
    cut = (top_p < 1) & (before >= top_p * mass.sum(dim=-1, keepdim=True)) & (rank > 0)
    return ranked.masked_fill_(cut, -torch.inf)
