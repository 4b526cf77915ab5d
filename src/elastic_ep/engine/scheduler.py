"""Continuous batching: which tokens of which sequences the next step computes. Synchronous, no IO, no tensors.

Decodes go first; what is left of the token budget goes to prompts, in chunks, so that a long prompt never holds up the
decodes. Waiting sequences are admitted first come, first served, but those in mid-answer (of a lost rank, say) before new
ones, and only while the pages that are promised to all fit: then nobody who has begun has to wait until another ends.

A sequence that may go on to the end of the context is promised less than it may come to need. If pages run out all the
same, the youngest without output gives its own back, else the youngest, and is computed anew later: the oldest always
advances, and no request fails for lack of pages.
"""

from __future__ import annotations

import sys
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from elastic_ep.config import EngineLimits
from elastic_ep.engine.kv_pages import KVPages
from elastic_ep.wire.messages import Assign, SamplingParams

HORIZON = 512
"""Tokens that an open-ended sequence is promised beyond those that it has."""


@dataclass(eq=False, slots=True)
class Sequence:
    """A request in progress. `tokens` is prompt and output; the KV cache holds the first `computed` of them."""

    request_id: int
    tokens: list[int]
    prompt_len: int
    params: SamplingParams
    seed: int
    choice: int
    computed: int = 0
    pages: list[int] = field(default_factory=list)
    stops: frozenset[int] = frozenset()
    """Tokens that end it."""
    most: int = sys.maxsize
    """Tokens with which it ends, those of the prompt included."""
    alone_until: int = 0
    """Until it has put out so many tokens it is computed in steps of nothing else."""

    @classmethod
    def of(cls, assign: Assign, eos: frozenset[int], max_model_len: int) -> Sequence:
        params = assign.params
        return cls(
            request_id=assign.request_id,
            tokens=[*assign.prompt, *assign.emitted],
            prompt_len=len(assign.prompt),
            params=params,
            seed=assign.seed,
            choice=assign.choice,
            stops=frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else eos),
            most=min(len(assign.prompt) + params.max_tokens, max_model_len),
            alone_until=len(assign.emitted) + assign.alone if assign.alone else 0,
        )

    @property
    def output_len(self) -> int:
        return len(self.tokens) - self.prompt_len


class Chunk(NamedTuple):
    """Compute tokens[start : start + length] of `sequence`; the last one known yields logits."""

    sequence: Sequence
    start: int
    length: int

    @property
    def samples(self) -> bool:
        return self.start + self.length == len(self.sequence.tokens)


class Scheduler:
    """`running` hold pages for all tokens that they have, `suspects` too: of these one is computed by itself in every
    other step, as it may break the device, and then only that one is to blame.

    Raises ValueError if one sequence of the greatest length would not fit into the cache.
    """

    def __init__(self, limits: EngineLimits) -> None:
        self._limits = limits
        self.pages = KVPages(limits.num_pages, limits.page_size)
        if limits.sequence_pages > limits.num_pages:
            raise ValueError(
                f"{limits.num_pages} KV pages of {limits.page_size} tokens cannot hold one sequence of "
                f"{limits.max_model_len} tokens"
            )
        if limits.max_num_batched_tokens < limits.max_num_seqs:
            raise ValueError(
                "max_num_batched_tokens must be at least max_num_seqs: every decode fits into a step"
            )
        self.running: list[Sequence] = []  # oldest first
        self.suspects: deque[Sequence] = deque()  # next first
        self.waiting: deque[Sequence] = deque()  # those in mid-answer first
        self.preemptions = 0
        self._suspects_turn = False

    def add(self, sequence: Sequence) -> None:
        if sequence.output_len:
            self.waiting.insert(self._in_mid_answer(), sequence)
        else:
            self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Finished or cancelled."""
        if sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.suspects:
            self.suspects.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self._release(sequence)

    def find(self, request_id: int) -> Sequence | None:
        everyone = (*self.running, *self.suspects, *self.waiting)
        return next((seq for seq in everyone if seq.request_id == request_id), None)

    def schedule(self) -> list[Chunk]:
        """The next step's batch. Nothing is computed before `commit`: an uncommitted batch is scheduled again."""
        if self.suspects:
            self._suspects_turn = not self._suspects_turn
            if self._suspects_turn and (chunks := self._one_suspect()):
                return chunks
        chunks = self._decodes()
        budget = self._limits.max_num_batched_tokens - len(chunks)
        for sequence in self.running if len(chunks) < len(self.running) else ():
            length = min(budget, len(sequence.tokens) - sequence.computed)
            if sequence.computed + 1 < len(sequence.tokens) and length > 0:
                chunks.append(Chunk(sequence, sequence.computed, length))
                budget -= length
        while budget > 0 and (admitted := self._admit()):
            if admitted.alone_until:
                self.suspects.append(admitted)
                continue
            self.running.append(admitted)
            length = min(budget, len(admitted.tokens))
            chunks.append(Chunk(admitted, 0, length))
            budget -= length
        return chunks or self._one_suspect()

    def commit(self, chunks: list[Chunk]) -> None:
        """The chunks are in the KV cache."""
        for chunk in chunks:
            chunk.sequence.computed = chunk.start + chunk.length

    def _one_suspect(self) -> list[Chunk]:
        """A batch of one of the suspects; those that have proved themselves are none any more."""
        while self.suspects:
            sequence = self.suspects.popleft()
            if sequence.output_len >= sequence.alone_until:
                sequence.alone_until = 0
                self.running.append(sequence)
            elif self._make_room(sequence):
                self.suspects.append(sequence)
                left = len(sequence.tokens) - sequence.computed
                return [Chunk(sequence, sequence.computed, min(left, self._limits.max_num_batched_tokens))]
        return []

    def _decodes(self) -> list[Chunk]:
        chunks = []
        page_size, preemptions = self._limits.page_size, self.preemptions
        for sequence in tuple(self.running):
            computed = sequence.computed
            if computed + 1 != len(sequence.tokens):
                continue
            if self.preemptions != preemptions and sequence not in self.running:
                continue  # it has had to give its pages to one before it
            if computed < len(sequence.pages) * page_size or self._make_room(sequence):
                chunks.append(Chunk(sequence, computed, 1))
        if self.preemptions != preemptions:  # of one that was in the batch already
            chunks = [chunk for chunk in chunks if chunk.sequence.pages]
        return chunks

    def _make_room(self, sequence: Sequence) -> bool:
        """Pages for all tokens of `sequence`, from others if need be. False: it was itself preempted."""
        missing = self.pages.pages_for(len(sequence.tokens)) - len(sequence.pages)
        if missing == 0:
            return True
        while (pages := self.pages.take(missing)) is None:
            victim = self._victim(sequence)
            self._preempt(victim)
            if victim is sequence:
                return False
        sequence.pages += pages
        return True

    def _victim(self, asking: Sequence) -> Sequence:
        """The youngest of those without output, else the youngest; one under suspicion only if there is nobody else."""
        new = [sequence for sequence in self.running if not sequence.output_len]
        candidates = new or self.running or list(self.suspects)
        return candidates[-1] if candidates else asking

    def _preempt(self, victim: Sequence) -> None:
        if victim in self.running:
            self.running.remove(victim)
        elif victim in self.suspects:
            self.suspects.remove(victim)
        self._release(victim)
        self.waiting.insert(0 if victim.output_len else self._in_mid_answer(), victim)
        self.preemptions += 1

    def _admit(self) -> Sequence | None:
        """The first that waits, with pages, if there is a seat and room for what it is promised."""
        taken = len(self.running) + len(self.suspects)
        if not self.waiting or taken >= self._limits.max_num_seqs:
            return None
        sequence = self.waiting[0]
        if taken and self._promised(sequence) + self._promised_to_all() > self.pages.num_pages:
            return None
        pages = self.pages.take(self.pages.pages_for(len(sequence.tokens)))
        if pages is None:
            return None
        sequence.pages = pages
        return self.waiting.popleft()

    def _promised(self, sequence: Sequence) -> int:
        """Pages for all that it may generate; `HORIZON` ahead if it may go on to the end of the context."""
        known, longest = len(sequence.tokens), self._limits.max_model_len
        most = sequence.most if sequence.most < longest else min(longest, known + HORIZON)
        return self.pages.pages_for(most)

    def _promised_to_all(self) -> int:
        return sum([self._promised(sequence) for sequence in (*self.running, *self.suspects)])

    def _in_mid_answer(self) -> int:
        """How many of those that wait, at their front."""
        return next(
            (place for place, seq in enumerate(self.waiting) if not seq.output_len), len(self.waiting)
        )

    def _release(self, sequence: Sequence) -> None:
        self.pages.give_back(sequence.pages)
        sequence.pages = []
        sequence.computed = 0
