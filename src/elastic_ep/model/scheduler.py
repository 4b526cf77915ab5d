"""Continuous batching: which tokens of which sequences the next step computes. Synchronous, no IO, no tensors.

First come, first served. Decodes go first; what is left of the token budget goes to prompts, in chunks, so that a long
prompt never holds up the decodes. When pages run out the youngest sequence gives all of its back and is computed anew
later (vLLM's preemption by recomputation), so the oldest always advances and no request fails for lack of pages.
"""

from __future__ import annotations

import sys
from collections import deque
from dataclasses import dataclass, field
from typing import NamedTuple

from elastic_ep.config import EngineLimits
from elastic_ep.messages import Assign, SamplingParams
from elastic_ep.model.kv_pages import KVPages


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
    """Sequences wait in order of arrival; those running hold pages for all tokens that they have.

    Raises ValueError if one sequence of the greatest length would not fit into the cache.
    """

    def __init__(self, limits: EngineLimits) -> None:
        self._limits = limits
        self.pages = KVPages(limits.num_pages, limits.page_size)
        if self.pages.pages_for(limits.max_model_len) > limits.num_pages:
            raise ValueError(
                f"{limits.num_pages} KV pages of {limits.page_size} tokens cannot hold one sequence of "
                f"{limits.max_model_len} tokens"
            )
        if limits.max_num_batched_tokens < limits.max_num_seqs:
            raise ValueError(
                "max_num_batched_tokens must be at least max_num_seqs: every decode fits into a step"
            )
        self.running: list[Sequence] = []  # oldest first
        self.waiting: deque[Sequence] = deque()  # all younger than those running
        self.preemptions = 0

    def add(self, sequence: Sequence) -> None:
        self.waiting.append(sequence)

    def remove(self, sequence: Sequence) -> None:
        """Finished or cancelled."""
        if sequence in self.running:
            self.running.remove(sequence)
        else:
            self.waiting.remove(sequence)
        self._release(sequence)

    def find(self, request_id: int) -> Sequence | None:
        return next((seq for seq in (*self.running, *self.waiting) if seq.request_id == request_id), None)

    def schedule(self) -> list[Chunk]:
        """The next step's batch. Nothing is computed before `commit`: an uncommitted batch is scheduled again."""
        chunks = self._decodes()
        budget = self._limits.max_num_batched_tokens - len(chunks)
        for sequence in self.running if len(chunks) < len(self.running) else ():
            length = min(budget, len(sequence.tokens) - sequence.computed)
            if sequence.computed + 1 < len(sequence.tokens) and length > 0:
                chunks.append(Chunk(sequence, sequence.computed, length))
                budget -= length
        while budget > 0 and (admitted := self._admit()):
            length = min(budget, len(admitted.tokens))
            chunks.append(Chunk(admitted, 0, length))
            budget -= length
        return chunks

    def commit(self, chunks: list[Chunk]) -> None:
        """The chunks are in the KV cache."""
        for chunk in chunks:
            chunk.sequence.computed = chunk.start + chunk.length

    def _decodes(self) -> list[Chunk]:
        chunks = []
        page_size = self._limits.page_size
        for sequence in self.running:  # shrinks from its end when a sequence is preempted
            computed = sequence.computed
            if computed + 1 != len(sequence.tokens):
                continue
            if computed < len(sequence.pages) * page_size or self._make_room(sequence):
                chunks.append(Chunk(sequence, computed, 1))
        return chunks

    def _make_room(self, sequence: Sequence) -> bool:
        """Pages for all tokens of `sequence`, from younger ones if need be. False: it was itself preempted."""
        missing = self.pages.pages_for(len(sequence.tokens)) - len(sequence.pages)
        if missing == 0:
            return True
        while (pages := self.pages.take(missing)) is None:
            victim = self.running.pop()
            self._release(victim)
            self.waiting.appendleft(victim)
            self.preemptions += 1
            if victim is sequence:
                return False
        sequence.pages += pages
        return True

    def _admit(self) -> Sequence | None:
        if not self.waiting or len(self.running) >= self._limits.max_num_seqs:
            return None
        sequence = self.waiting[0]
        pages = self.pages.take(self.pages.pages_for(len(sequence.tokens)))
        if pages is None:
            return None
        sequence.pages = pages
        self.running.append(self.waiting.popleft())
        return sequence

    def _release(self, sequence: Sequence) -> None:
        self.pages.give_back(sequence.pages)
        sequence.pages = []
        sequence.computed = 0
