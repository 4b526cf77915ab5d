"""What a rank's engine does whatever it computes on: requests in, one lockstep step at a time, tokens out."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator
from collections.abc import Sequence as Seq
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import overload

import numpy as np
import structlog
import torch

from elastic_ep.config import EngineLimits
from elastic_ep.engine.expert_load import ExpertLoad
from elastic_ep.engine.guiding import REASON_CHARACTERS, Guiding
from elastic_ep.engine.refusal import refusal
from elastic_ep.engine.routing_table import RoutingTable
from elastic_ep.engine.sampler import Sampled
from elastic_ep.engine.scheduler import Chunk, Scheduler, Sequence
from elastic_ep.exchange.base import Exchange
from elastic_ep.guided.masks import MaskMaker
from elastic_ep.guided.text import Words
from elastic_ep.kv.copier import PageCopier, PageMover, Shelf
from elastic_ep.kv.names import NO_PAGE, PageName
from elastic_ep.machines.rank.bisection import Bisection
from elastic_ep.placement import Placement
from elastic_ep.weights.bank import Weights
from elastic_ep.wire.messages import Assign, Cached, PageCounts, Token
from elastic_ep.wire.slot_messages import SlotSum

log = structlog.get_logger()
_Appended = tuple[int, int, Sampled, str | None]
"""Request, index, what was sampled, and finish as in `Token`."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """`masked` names the ranks that poisoned the step; it then committed nothing.

    `failed` names the request that cannot be computed, with the reason; the step then committed nothing either.
    `cached` comes with a request's first token, if any were.
    """

    failed: Seq[tuple[int, str]] = ()
    sampled: Seq[_Appended] = ()
    masked: frozenset[int] = frozenset()
    cached: Seq[Cached] = ()

    @property
    def tokens(self) -> tuple[Token, ...]:
        """Made when asked for, which can wait until the device has something to do."""
        return tuple(
            [
                Token(request_id, index, one.token, finish, one.logprob, one.top)
                for request_id, index, one, finish in self.sampled
            ]
        )


class LateTokens(Seq[_Appended]):
    """A step's tokens, noted down when somebody looks at them: that can wait until the next step is launched."""

    def __init__(self, count: int, note: Callable[[], list[_Appended]]) -> None:
        self._count = count
        self._note = note
        self._noted: list[_Appended] | None = None

    def noted(self) -> list[_Appended]:
        if self._noted is None:
            self._noted = self._note()
        return self._noted

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[_Appended]:
        return iter(self.noted())

    @overload
    def __getitem__(self, index: int) -> _Appended: ...

    @overload
    def __getitem__(self, index: slice) -> Seq[_Appended]: ...

    def __getitem__(self, index: int | slice) -> _Appended | Seq[_Appended]:
        return self.noted()[index]


@dataclass(frozen=True, slots=True)
class StreamMemory:
    """What a rank may go on from instead of computing it: see `Scheduler`. `shelf` None: there is none."""

    root: PageName = NO_PAGE
    share_prefixes: bool = True
    shelf: Shelf | None = None


NO_SHELF = StreamMemory()


class StepRunner(ABC):
    """Forward thread only, except where said. Raises ValueError if the limits do not fit together.

    An exception while a step is computed is laid at a sequence of it, which is found by running the batch again in
    halves; that request fails, and nobody else notices. But it is the rank's, and comes out of `run_step`, if the step
    cannot be completed for the peers, if something known to be good fails too, or if there was no sequence.
    """

    step_mode: Callable[[], AbstractContextManager[object]] = torch.inference_mode
    """In which a step is computed."""
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
        memory: StreamMemory = NO_SHELF,
        masks: MaskMaker | None = None,
    ) -> None:
        """`masks` None: requests with a grammar are refused."""
        self._limits = limits
        self._vocab_size = weights.spec.vocab_size
        self._eos = frozenset(weights.spec.eos_token_ids)
        self._placement = placement
        self._rank = rank
        self._exchange = exchange
        self._memory = memory
        self._copier: PageCopier | None = None
        self._scheduler = Scheduler(limits)
        self.weights = weights
        self._routing = routing
        self.load = load
        self._again: Bisection[Chunk] = Bisection()
        """Batches that have to run again before anything else is scheduled."""
        self._computing: list[Chunk] = []
        self._guiding = Guiding(masks, self._mask_memory)
        self._foreseen: list[Chunk] | None = None
        """The batch after the one that runs, or ran last, if prepared. It holds while that one's tokens are late."""
        self._late: LateTokens | None = None
        """The last step's tokens, if they may not have been noted down yet: none of them ends its sequence."""
        self._targets: list[Sequence] = []
        """Of this step: what to draw, for each chunk that samples."""
        self.set_routing({rank} if placement.num_ranks == 1 else range(placement.num_ranks))

    @abstractmethod
    def warm_up(self) -> None:
        """Do once, without peers, what a first step would be slow for."""

    def _open_memory(self, mover: PageMover) -> None:
        """The KV cache is there, with `_limits.num_pages`; nothing has been scheduled yet."""
        memory = self._memory
        self._copier = PageCopier(memory.shelf, mover) if memory.shelf is not None else None
        self._scheduler = Scheduler(
            self._limits,
            root=memory.root,
            share_prefixes=memory.share_prefixes,
            on_shelf=self._copier.on_shelf if self._copier else None,
        )

    def close(self) -> None:
        """No step is run any more. Ends the threads that copy pages and compute masks."""
        if self._copier is not None:
            self._copier.close()
        self._guiding.close()

    @abstractmethod
    def _launch(self, chunks: list[Chunk]) -> None:
        """All exchange operations of a step; of no chunks, too."""

    @abstractmethod
    def _complete(self) -> None:
        """What `_launch` has left to do for the peers when it raised. Raises what makes the rank useless to them."""

    @abstractmethod
    def prove_well(self) -> None:
        """Compute something that is known to be good, without peers, between two steps. Raises if even that fails."""

    @abstractmethod
    def _discard(self) -> None:
        """The step that was launched last is poisoned, or has failed."""

    @abstractmethod
    def _sample(self, sequences: Seq[Sequence]) -> list[Sampled]:
        """From the step launched last, which has ended: a token for each of `_targets`, at least one.

        Changes nothing if it raises.
        """

    def _foresee(self, chunks: list[Chunk]) -> list[Chunk] | None:
        """While the device works on `chunks`: the batch after it, prepared, if that is easily told. It is launched before
        the tokens of `chunks` are noted down."""
        return None

    def _told_later(self, chunks: list[Chunk]) -> LateTokens | None:
        """The tokens of a step after which one was foreseen; None: it has not ended so that this one can follow."""
        return None

    def _settle(self) -> None:
        """Note down what the last step has left: something else than was foreseen may come next."""
        if self._late is not None:
            late, self._late = self._late, None
            late.noted()

    def _note(self, chunks: list[Chunk], tokens: Seq[int]) -> list[_Appended]:
        """Of a step of decodes, none of which ends its sequence."""
        self._scheduler.commit(chunks)
        appended: list[_Appended] = []
        for (sequence, _, _), token in zip(chunks, tokens, strict=True):
            index = len(sequence.tokens) - sequence.prompt_len + sequence.given
            sequence.tokens.append(token)
            appended.append((sequence.request_id, index, Sampled(token), None))
        return appended

    @property
    def running(self) -> int:
        """Requests that have a seat."""
        return self._scheduler.taken

    @property
    def waiting(self) -> int:
        return len(self._guiding.opening) + len(self._scheduler.waiting)

    @property
    def page_counts(self) -> PageCounts:
        """Any thread."""
        scheduler, pages = self._scheduler, self._scheduler.pages
        return PageCounts(
            total=pages.num_pages,
            held=pages.held,
            named=pages.named,
            queries=scheduler.asked,
            hits=scheduler.hits,
            evictions=pages.evictions,
            **self._shelf_counts(),
        )

    def _shelf_counts(self) -> dict[str, int]:
        if self._copier is None:
            return {}
        shelf = self._copier.counts
        return {
            "shelf_pages": shelf.pages,
            "shelf_bytes": shelf.pages * self._copier.page_bytes,
            "stored": shelf.stored,
            "fetched": shelf.fetched,
            "dropped": shelf.evicted + shelf.dropped,
            "bad": shelf.bad,
        }

    @property
    def num_pages(self) -> int:
        """Pages of the KV cache. Known for good after `warm_up`."""
        return self._limits.num_pages

    @property
    def has_work(self) -> bool:
        return bool(self.running or self.waiting)

    @property
    def held(self) -> tuple[int, ...]:
        """The requests that wait, in order."""
        opening = [sequence.request_id for sequence, _ in self._guiding.opening]
        return (*opening, *[sequence.request_id for sequence in self._scheduler.waiting])

    @property
    def suspects(self) -> tuple[int, ...]:
        """When `run_step` has raised: the requests that may have broken this rank's device for good.

        Only a device remembers a fault. Where there is none, what was raised is no sequence's.
        """
        return tuple([chunk.sequence.request_id for chunk in self._computing]) if self.launches_ahead else ()

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

    def add(self, assign: Assign) -> str:
        """Take over a request from position len(prompt) + len(emitted) on. Else the reason why it cannot be run."""
        self._settle()
        try:
            guides = self._guiding.can
            reason = refusal(assign, self._vocab_size, self._limits.max_model_len, guides=guides)
            if not reason:
                self.cancel(assign.request_id)
                sequence = Sequence.of(assign, self._eos, self._limits.max_model_len)
                if not self._guiding.open(sequence, assign):
                    self._scheduler.add(sequence)
        except Exception as error:
            log.exception("a request cannot be taken over", request=assign.request_id)
            return _words(error)
        return reason

    def cancel(self, request_id: int) -> None:
        """Forget a request. Unknown ids are no error."""
        self._settle()
        self._guiding.cancel(request_id)
        sequence = self._scheduler.find(request_id)
        if sequence is not None:
            self._drop(sequence)

    def _drop(self, sequence: Sequence) -> None:
        self._scheduler.remove(sequence)
        self._again.forget(lambda chunk: chunk.sequence is sequence)

    def run_step(self, step: int, schedule: bool, launched: Callable[[], None] = lambda: None) -> StepResult:
        """One step: always the same number of exchange operations, tokens only if nothing was masked meanwhile.

        `launched` is called before the wait for the results.

        A poisoned step's batch runs again as it was: its KV entries are overwritten. What came in meanwhile (a lost
        rank's requests, with all their tokens to compute) waits for the step after, so that the clients of this one do
        not wait for it.
        """
        if self._guiding.opening:
            self._settle()
        lost = self._guiding.begin_opened(self._scheduler.add)
        with self.step_mode():
            result = self._step(step, schedule, launched)
        return replace(result, failed=[*lost, *result.failed]) if lost else result

    def _step(self, step: int, schedule: bool, launched: Callable[[], None]) -> StepResult:
        self._exchange.begin_step(step)
        self._take_done()
        foreseen = self._foreseen if schedule and self._late is not None else None
        if foreseen is None:
            self._settle()
            chunks = self._next_batch() if schedule else []
            drawn = [chunk for chunk in chunks if chunk.samples]
            targets = [chunk.target for chunk in drawn]
        else:
            chunks = drawn = foreseen
            targets = self._targets
        self._computing, self._targets = chunks, targets
        self._guiding.start(targets)
        failure = self._compute(chunks)
        launched()
        self._settle()
        self._ask_copies()
        self._foreseen = self._foresee(chunks) if failure is None else None
        masked = self._exchange.end_step()
        if masked:  # whatever has failed, may have failed for that
            if chunks:
                self._discard()
                self._again.again(chunks)
            return StepResult(masked=masked)
        if not chunks:
            return StepResult()
        late = self._late = self._told_later(chunks) if self._foreseen is not None else None
        if late is not None:
            return StepResult(sampled=late)
        sampled: list[Sampled] = []
        if failure is None and targets:
            try:
                sampled = self._sample(targets)
            except Exception as error:
                failure = error
        if failure is not None:
            return self._failed(chunks, failure)
        self._scheduler.commit(chunks)
        return self._append(drawn, sampled)

    def _mask_memory(self, rows: int, words: int) -> Words:
        """For a step's masks."""
        return np.empty((rows, words), np.uint32)

    def _next_batch(self) -> list[Chunk]:
        return self._again.take() or self._scheduler.schedule()

    def _take_done(self) -> None:
        """Copies of pages that are over since the last step."""
        if self._copier is not None:
            done = self._copier.take_done()
            self._scheduler.stored(done.stored)
            for ticket, good in done.fetched:
                self._scheduler.fetched(ticket, good)

    def _ask_copies(self) -> None:
        """While the device works. The pages were committed by earlier steps, or are nobody's yet."""
        copies = self._scheduler.take_copies()
        if self._copier is not None:
            for fetch in copies.fetch:
                self._copier.fetch(*fetch)
            if copies.store:
                self._copier.store(copies.store)

    def _compute(self, chunks: list[Chunk]) -> Exception | None:
        """Launch the step. What it raised, if its operations could be completed all the same."""
        try:
            self._launch(chunks)
        except Exception as error:
            if not chunks:
                raise
            self._complete()
            return error
        return None

    def _failed(self, chunks: list[Chunk], failure: Exception) -> StepResult:
        """The step has ended, and one of its sequences is to blame."""
        self._discard()
        culprit = self._again.failed(chunks)
        if culprit is None:
            log.warning(
                "a step failed: its batch runs again in halves", batch=len(chunks), why=_words(failure)
            )
            return StepResult()
        self.prove_well()
        request_id = culprit.sequence.request_id
        log.error("a request cannot be computed, and ends", request=request_id, exc_info=failure)
        self._drop(culprit.sequence)
        return StepResult(failed=[(request_id, f"computing it raised {_words(failure)}")])

    def _append(self, chunks: Seq[Chunk], sampled: Seq[Sampled]) -> StepResult:
        """The device is idle meanwhile: one loop, without a call for each token."""
        appended: list[_Appended] = []
        failed: list[tuple[int, str]] = []
        cached: list[Cached] = []
        for (sequence, _, _), one in zip(chunks, sampled, strict=True):
            try:
                if sequence.untold:
                    appended.append(self._tell(sequence, one))
                    continue
                if sequence.guided is not None and sequence.guided.fault:
                    self._drop(sequence)
                    failed.append((sequence.request_id, sequence.guided.fault))
                    continue
                tokens, token = sequence.tokens, one.token
                index = len(tokens) - sequence.prompt_len + sequence.given
                if index == 0 and sequence.cached:
                    cached.append(Cached(sequence.request_id, sequence.cached))
                tokens.append(token)
                finish = None
                if token in sequence.stops:
                    finish = "stop"
                elif len(tokens) >= sequence.most:
                    finish = "length"
                if finish is not None:
                    self._scheduler.remove(sequence)
            except Exception as error:  # that sequence's alone, as its name is known
                log.exception("a request cannot be continued, and ends", request=sequence.request_id)
                self._drop(sequence)
                failed.append((sequence.request_id, f"continuing it raised {_words(error)}"))
                continue
            appended.append((sequence.request_id, index, one, finish))
        return StepResult(failed, appended, cached=cached)

    def _tell(self, sequence: Sequence, one: Sampled) -> _Appended:
        """The next of its tokens that are given."""
        index = sequence.given - sequence.untold
        sequence.untold -= 1
        finish = "length" if sequence.needed >= sequence.most else None
        if finish is not None:
            self._scheduler.remove(sequence)
        return sequence.request_id, index, one, finish


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:REASON_CHARACTERS]
