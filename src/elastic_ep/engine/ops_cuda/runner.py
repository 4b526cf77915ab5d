"""A rank's engine on a GPU: the same steps as on the processor, in graphs, and one wait for the device a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from collections.abc import Sequence as Seq
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from elastic_ep.config import EngineLimits
from elastic_ep.engine.interrupted import CountedCarrier
from elastic_ep.engine.ops_cuda.draws import Drawn, Draws
from elastic_ep.engine.ops_cuda.graphs import StepGraphs
from elastic_ep.engine.ops_cuda.inputs import TILE_ROWS, NextDecodes, StepInputs, StepShape
from elastic_ep.engine.ops_cuda.load import DeviceLoad
from elastic_ep.engine.ops_cuda.memory import Budget, needed_by_graphs
from elastic_ep.engine.ops_cuda.ops import CudaOps
from elastic_ep.engine.ops_cuda.pages import CudaPages
from elastic_ep.engine.prompt_pace import PromptPace
from elastic_ep.engine.sampler import Sampled, is_plain_greedy
from elastic_ep.engine.scheduler import Chunk, Sequence
from elastic_ep.engine.step_runner import NO_SHELF, LateTokens, StepResult, StepRunner, StreamMemory
from elastic_ep.engine.transformer import Transformer
from elastic_ep.exchange.base import DeviceExchange, Work, check_rows
from elastic_ep.guided.masks import MaskMaker
from elastic_ep.guided.text import ANY, Words
from elastic_ep.placement import Placement
from elastic_ep.weights.bank import Weights
from elastic_ep.wire.messages import SamplingParams

_EXAMPLES = [
    Sequence(0, [0, 0], 1, params, 0, 0)
    for params in (
        SamplingParams(1, temperature=0.7, top_p=0.8, top_k=20, min_p=0.01, repetition_penalty=1.1),
        SamplingParams(1, logprobs=1),
    )
]
"""What is drawn at warm-up, so that no step is the first to load the kernels for it."""


MOST_STOPS = 16
"""That are looked for among a step's tokens all at once."""


@dataclass(frozen=True, slots=True)
class Ahead:
    """A step of decodes that is launched before the tokens of the one before it are noted down: it is of the same
    sequences, if none of these ends by one of `stops`."""

    next: NextDecodes
    stops: frozenset[int]


LEAST_CHUNK = 64
"""Tokens of prompts that a step computes whatever the decodes beside them are held up by."""


def is_steady(sequence: Sequence) -> bool:
    """It has put out a token that was drawn, and its next one is the most likely, whatever it is."""
    if sequence.untold or sequence.guided is not None or not sequence.output_len:
        return False
    return is_plain_greedy(sequence.params)


def _work_of(chunks: Seq[Chunk]) -> Work:
    lengths = [length for _, _, length in chunks if length > 1]
    return Work(sum(lengths), len(chunks) - len(lengths))


class CudaRunner(StepRunner):
    """Forward thread only, on its current stream, which must stay the same.

    `tile` rows are computed at least. Without `graphs` every step is eager, as on a processor through Triton's
    interpreter. A poisoned step leaves nothing that must be cleaned: what it wrote to the KV cache is overwritten
    before it is read, and what is not read is not multiplied either. `budget` explains a lack of memory, and says how
    large the KV cache is.
    """

    launches_ahead = True

    def __init__(
        self,
        limits: EngineLimits,
        weights: Weights,
        placement: Placement,
        rank: int,
        exchange: DeviceExchange,
        *,
        tile: int = TILE_ROWS,
        graphs: bool = True,
        budget: Budget | None = None,
        memory: StreamMemory = NO_SHELF,
        masks: MaskMaker | None = None,
    ) -> None:
        check_rows(exchange, weights.embed.dtype)
        device = weights.embed.device
        self._inputs = StepInputs(limits, tile, device)
        self._ops = CudaOps(
            weights.spec,
            limits,
            self._inputs,
            placement.num_ranks,
            placement.slots_per_rank,
            weights.embed.dtype,
            device,
        )
        self._model = Transformer(weights, self._ops)
        self._device_exchange = exchange
        self._carrier = CountedCarrier(exchange)
        self._graphs = StepGraphs(self._body) if graphs else None
        self._budget = budget
        self._tile = tile
        self._device = device
        pinned = device.type == "cuda"
        self._copies = torch.cuda.Stream(device) if pinned else None
        self._tokens = torch.zeros(self._inputs.max_sequences, dtype=torch.int64, pin_memory=pinned)
        self._pace = PromptPace(LEAST_CHUNK, limits.max_num_batched_tokens, limits.prompt_stretch)
        self._busy = Work(0, 0)
        """What all ranks did in the last step."""
        self._mask_room = self._mask_rows = torch.empty(0, 0, dtype=torch.int32)
        """Host memory for masks, and the rows of it that a step's masks are in."""
        self._ahead: Ahead | None = None
        """Of the batch that was foreseen last."""
        self._known: npt.NDArray[np.int64] = np.empty(0, np.int64)
        """The tokens of the step before it."""
        self._rows: list[int] = []
        """Of the step's results: those that are sampled from."""
        self._met = self._launched = False
        """How far the launch of this step has come: hosts have met, all operations are queued."""
        self._drawn: Drawn | None = None
        """None: the most likely token of each."""
        load = DeviceLoad(placement, rank, self._ops.load)
        super().__init__(limits, weights, placement, rank, exchange, self._ops.routing, load, memory, masks)
        if budget is None or budget.share is None:
            self._open_memory(CudaPages(self._ops.caches))

    def set_routing(self, active_ranks: Collection[int], placement: Placement | None = None) -> bool:
        covered = super().set_routing(active_ranks, placement)
        # Without a copy of every expert nothing is computed, hence nothing sent to anyone.
        self._device_exchange.route_to(active_ranks if covered else ())
        return covered

    def copy_expert(self, layer: int, physical: int, logical: int) -> int:
        """On a stream of its own.

        HAZARD: this is the slots' thread, whose current device is 0. What `torch.cuda.stream` puts back at its end is
        that device's stream, which makes a context there, on another rank's GPU.
        """
        if self._copies is None:
            return super().copy_expert(layer, physical, logical)
        with torch.cuda.device(self._copies.device), torch.cuda.stream(self._copies):
            return super().copy_expert(layer, physical, logical)

    @torch.inference_mode()
    def warm_up(self) -> None:
        """Compile and capture every shape, all peers being inactive: the first step in the group must not be slow.

        Nothing of a step is allocated before, so here it shows how much memory steps need, and what is left for the KV
        cache; graphs know its address, so they are captured last. Raises NotEnoughMemory.
        """
        with self._budget.kept() if self._budget is not None else nullcontext():
            shapes = self._inputs.graphed()
            self._give_back()
            before = self._reserved()
            for number, shape in enumerate(dict.fromkeys([*self._inputs.largest(), *shapes])):
                self._run_once(shape, draw=number == 0)
            if self._budget is not None and self._budget.share is not None:
                self._size_cache(self._budget, self._reserved() - before)
            if self._graphs is not None:
                for shape in shapes:
                    self._graphs.capture(shape)

    def _size_cache(self, budget: Budget, step: int) -> None:
        """`step` bytes are what eager steps have at work, and keep."""
        pages = budget.pages(needed_by_graphs(step))
        self._limits = replace(self._limits, num_pages=pages)
        self._ops.resize(self._limits.cache_pages)
        self._open_memory(CudaPages(self._ops.caches))

    def _reserved(self) -> int:
        """Bytes that torch has of the device."""
        return int(torch.cuda.memory_reserved(self._device)) if self._device.type == "cuda" else 0

    def _give_back(self) -> None:
        """What torch has of the device for nothing, so that all that steps take is seen."""
        if self._device.type == "cuda":
            torch.cuda.empty_cache()

    def _run_once(self, shape: StepShape, *, draw: bool) -> None:
        self._exchange.begin_step(-1)
        self._inputs.fill((), shape)
        logits, tokens = self._body(shape)
        self._tokens[: len(tokens)].copy_(tokens, non_blocking=True)
        if draw:
            examples = _EXAMPLES[: len(logits)]
            words = -(-logits.shape[1] // 32)
            self._mask_memory(len(examples), words)[:] = ANY
            Draws(examples, self._device).run(logits, self._mask_rows).to_host()
        self._device_exchange.read_masks()
        self._exchange.end_step()

    def _body(self, shape: StepShape) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [S, V] float32 and the most likely tokens [S]."""
        logits = self._model.forward(shape, self._carrier)
        return logits, logits.argmax(dim=-1)

    def run_step(self, step: int, schedule: bool, launched: Callable[[], None] = lambda: None) -> StepResult:
        """And learns how long steps take, all ranks' steps: then prompts leave those who decode their pace."""
        began_ns = time.monotonic_ns()
        result = super().run_step(step, schedule, launched)
        if not (result.masked or result.failed):
            self._busy = self._device_exchange.work()
            self._pace.observe(*self._busy, time.monotonic_ns() - began_ns)
        return result

    def _next_batch(self) -> list[Chunk]:
        return self._again.take() or self._scheduler.schedule(self._prompt_tokens)

    def _prompt_tokens(self) -> int:
        """Whoever decoded anywhere in the last step does so in this one, most of the time."""
        return self._pace.budget(self._busy.decodes)

    def _launch(self, chunks: list[Chunk]) -> None:
        self._met = self._launched = False
        self._carrier.begin()
        draws = None
        if self._ahead is not None and chunks is self._foreseen:
            shape, work = self._inputs.decode_shape(len(chunks)), Work(0, len(chunks))
            self._inputs.fill_next(self._ahead.next, self._known)
        else:
            draws = self._prepare_draws(chunks)
            shape, work = self._inputs.shape_of(chunks), _work_of(chunks)
            self._inputs.fill(chunks, shape)
        self._meet(work)
        logits, tokens = self._run(shape)
        # Queued: the wait for the masks is the wait for what is sampled too.
        self._rows = [row for row, chunk in enumerate(chunks) if chunk.samples]
        if draws is not None:
            masks = self._mask_rows if self._guiding.masks() is not None else None
            self._drawn = draws.run(logits, masks).to_host()
        elif self._rows:
            self._drawn = None
            self._tokens[: len(tokens)].copy_(tokens, non_blocking=True)
        self._device_exchange.read_masks()

    def _foresee(self, chunks: list[Chunk]) -> list[Chunk] | None:
        """For the most likely tokens alone: what is drawn otherwise may depend on all tokens before."""
        if self._drawn is not None or not chunks or len(self._targets) != len(chunks) or self._again.groups:
            return None
        stops: set[int] = set()
        for sequence, _, _ in chunks:
            if not is_steady(sequence) or len(sequence.tokens) + 1 >= sequence.most:
                return None
            stops |= sequence.stops
        if len(stops) > MOST_STOPS or (foreseen := self._scheduler.foresee(chunks)) is None:
            return None
        prepared = self._inputs.prepare_next(foreseen)
        if prepared is None:
            return None
        self._ahead = Ahead(prepared, frozenset(stops))
        return foreseen

    def _told_later(self, chunks: list[Chunk]) -> LateTokens | None:
        assert self._ahead is not None
        # The next step's come to the same place.
        tokens = self._known = self._tokens.numpy()[: len(chunks)].copy()
        if any((tokens == stop).any() for stop in self._ahead.stops):
            return None
        return LateTokens(len(chunks), lambda: self._note(chunks, tokens.tolist()))

    def _meet(self, work: Work) -> None:
        self._device_exchange.meet(work)
        self._met = True

    def _run(self, shape: StepShape) -> tuple[torch.Tensor, torch.Tensor]:
        out = self._graphs.run(shape) if self._graphs is not None else self._body(shape)
        self._launched = True
        return out

    def _complete(self) -> None:
        """HAZARD: a device that is broken for good raises in whatever it is asked next: here, and not at a sequence."""
        if not self._launched:
            self._synchronise()  # the inputs' host memory may still be read
            shape = self._inputs.shape_of(())
            self._inputs.fill((), shape)
            if not self._met:
                self._meet(_work_of(()))
            if self._carrier.performed:
                embed = self.weights.embed
                self._model.complete(shape, embed.new_zeros(shape.rows, embed.shape[1]), self._carrier)
            else:
                self._run(shape)
        self._device_exchange.read_masks()

    def prove_well(self) -> None:
        """The step that failed was completed, by the same kernels: what is left to see is whether the device says so."""
        self._synchronise()

    def _synchronise(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def _prepare_draws(self, chunks: Seq[Chunk]) -> Draws | None:
        """None where the most likely tokens will do. Before the launch: what is copied here would wait for it."""
        if all(is_plain_greedy(target.params) for target in self._targets):
            return None
        rows = [row for row, chunk in enumerate(chunks) if chunk.samples]
        return Draws(self._targets, self._device, rows)

    def _mask_memory(self, rows: int, words: int) -> Words:
        """Pinned, so that masks can be copied behind a step that runs. The same for all steps: of the one before either
        what was drawn by its masks is there, or nobody wants it any more."""
        if len(self._mask_room) < rows or self._mask_room.shape[1] != words:
            pinned = self._device.type == "cuda"
            self._mask_room = torch.empty(rows, words, dtype=torch.int32, pin_memory=pinned)
        self._mask_rows = self._mask_room[:rows]
        return self._mask_rows.numpy().view(np.uint32)

    def _discard(self) -> None:
        pass

    def _sample(self, sequences: Seq[Sequence]) -> list[Sampled]:
        if self._drawn is not None:
            return self._drawn.sampled(sequences)
        tokens = self._tokens.tolist()
        return [Sampled(tokens[row]) for row in self._rows]
