"""What a rank's engine does whatever it computes on: requests in, one lockstep step at a time, tokens out."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from collections.abc import Sequence as Seq
from dataclasses import dataclass

import torch

from elastic_ep.config import EngineLimits
from elastic_ep.exchange.base import Exchange
from elastic_ep.messages import Assign, Token
from elastic_ep.model.expert_load import ExpertLoad
from elastic_ep.model.routing_table import RoutingTable
from elastic_ep.model.sampler import Sampled
from elastic_ep.model.scheduler import Chunk, Scheduler, Sequence
from elastic_ep.model.weights import Weights
from elastic_ep.placement import Placement
from elastic_ep.slot_messages import SlotSum

_Appended = tuple[int, int, Sampled, str | None]
"""Request, index, what was sampled, and finish as in `Token`."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """`masked` names the ranks that poisoned the step; it then committed nothing."""

    ended: Seq[Token] = ()
    """Of requests that ended without a step."""
    sampled: Seq[_Appended] = ()
    masked: frozenset[int] = frozenset()

    @property
    def tokens(self) -> tuple[Token, ...]:
        """Made when asked for, which can wait until the device has something to do."""
        made = [
            Token(request_id, index, one.token, finish, one.logprob, one.top)
            for request_id, index, one, finish in self.sampled
        ]
        return (*self.ended, *made)


class StepRunner(ABC):
    """Forward thread only, except where said. Raises ValueError if the limits do not fit together."""

    launches_ahead = False
    """Whether `_launch` returns before the work is done: the device then works while the host does other things."""

    def __init__(
        self,
        limits: EngineLimits,
        weights: Weights,
        placement: Placement,
        rank: int,
        exchange: Exchange,
        routing: RoutingTable,
        load: ExpertLoad,
    ) -> None:
        self._limits = limits
        self._eos = frozenset(weights.spec.eos_token_ids)
        self._placement = placement
        self._rank = rank
        self._exchange = exchange
        self._scheduler = Scheduler(limits)
        self.weights = weights
        self._routing = routing
        self.load = load
        self._ended: list[Token] = []
        self._poisoned: list[Chunk] = []
        """The batch that has to run again."""
        self.set_routing({rank} if placement.num_ranks == 1 else range(placement.num_ranks))

    @abstractmethod
    def warm_up(self) -> None:
        """Do once, without peers, what a first step would be slow for."""

    @abstractmethod
    def _launch(self, chunks: list[Chunk]) -> None:
        """All exchange operations of a step; of no chunks, too."""

    @abstractmethod
    def _discard(self) -> None:
        """The step that was launched last is poisoned."""

    @abstractmethod
    def _sample(self, sequences: Seq[Sequence]) -> list[Sampled]:
        """From the step launched last, which has ended: a token for each of its sequences that samples, at least one."""

    @property
    def running(self) -> int:
        return len(self._scheduler.running)

    @property
    def waiting(self) -> int:
        return len(self._scheduler.waiting)

    @property
    def kv_pages(self) -> int:
        """Pages of the KV cache in use. Any thread."""
        pages = self._scheduler.pages
        return pages.num_pages - pages.free

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting or self._ended)

    @property
    def preemptions(self) -> int:
        return self._scheduler.preemptions

    def set_routing(self, active_ranks: Collection[int], placement: Placement | None = None) -> bool:
        """Route to the copies on `active_ranks` from the next step on, by a new `placement` if given.

        False if some expert has no copy there; the table then stays as it was and no step may schedule work.
        """
        if placement is not None:
            self._placement = placement
            self.load.adopt(placement)
        return self._routing.update(self._placement, active_ranks, self._rank)

    @property
    def slots_per_rank(self) -> int:
        return self._placement.slots_per_rank

    def copy_expert(self, layer: int, physical: int, logical: int) -> int:
        """Fill a slot of this rank that nobody addresses; the checksum of its bytes then. Any thread, one at a time."""
        slot = physical % self._placement.slots_per_rank
        self.weights.load_expert(layer, slot, logical)
        return self.weights.checksum(layer, slot)

    def slot_sums(self) -> list[SlotSum]:
        """The checksums of all slots. Any thread, one at a time, and not during `copy_expert`."""
        width = self._placement.slots_per_rank
        places = itertools.product(range(len(self._placement.slots)), range(width))
        return [
            SlotSum(layer, self._rank * width + slot, self.weights.checksum(layer, slot))
            for layer, slot in places
        ]

    def add(self, assign: Assign) -> None:
        """Take over a request from position len(prompt) + len(emitted) on."""
        sequence = Sequence.of(assign, self._eos, self._limits.max_model_len)
        if sequence.output_len >= assign.params.max_tokens:
            self._ended.append(Token(assign.request_id, sequence.output_len, sequence.tokens[-1], "length"))
        elif not 0 < len(sequence.tokens) < self._limits.max_model_len:
            self._ended.append(Token(assign.request_id, sequence.output_len, 0, "abort"))
        else:
            self._scheduler.add(sequence)

    def cancel(self, request_id: int) -> None:
        """Forget a request. Unknown ids are no error."""
        self._ended = [token for token in self._ended if token.request_id != request_id]
        sequence = self._scheduler.find(request_id)
        if sequence is not None:
            self._scheduler.remove(sequence)
            self._poisoned = [chunk for chunk in self._poisoned if chunk.sequence is not sequence]

    @torch.inference_mode()
    def run_step(self, step: int, schedule: bool, launched: Callable[[], None] = lambda: None) -> StepResult:
        """One step: always the same number of exchange operations, tokens only if nothing was masked meanwhile.

        `launched` is called before the wait for the results.

        A poisoned step's batch runs again as it was: its KV entries are overwritten. What came in meanwhile (a lost
        rank's requests, with all their tokens to compute) waits for the step after, so that the clients of this one do
        not wait for it.
        """
        self._exchange.begin_step(step)
        chunks = (self._poisoned or self._scheduler.schedule()) if schedule else []
        self._launch(chunks)
        sequences = [chunk.sequence for chunk in chunks if chunk.samples]
        launched()
        masked = self._exchange.end_step()
        if masked:
            if chunks:
                self._discard()
                self._poisoned = chunks
            return StepResult(masked=masked)
        if not chunks:
            return StepResult(ended=self._take_ended())
        self._poisoned = []
        self._scheduler.commit(chunks)
        sampled = self._sample(sequences) if sequences else []
        return StepResult(self._take_ended(), self._append(sequences, sampled))

    def _append(self, sequences: Seq[Sequence], sampled: Seq[Sampled]) -> list[_Appended]:
        """The device is idle meanwhile: one loop, without a call for each token."""
        appended: list[_Appended] = []
        for sequence, one in zip(sequences, sampled, strict=True):
            tokens, token = sequence.tokens, one.token
            index = len(tokens) - sequence.prompt_len
            tokens.append(token)
            finish = None
            if token in sequence.stops:
                finish = "stop"
            elif len(tokens) >= sequence.most:
                finish = "length"
            if finish is not None:
                self._scheduler.remove(sequence)
            appended.append((sequence.request_id, index, one, finish))
        return appended

    def _take_ended(self) -> list[Token]:
        ended, self._ended = self._ended, []
        return ended
