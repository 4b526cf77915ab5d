"""One rank's engine on the processor."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch

from elastic_ep.config import EngineLimits
from elastic_ep.engine.expert_load import ExpertLoad
from elastic_ep.engine.interrupted import CountedCarrier
from elastic_ep.engine.ops_cpu.batch import KEY_BLOCK, Batch, BatchMaker, CacheLayout
from elastic_ep.engine.ops_cpu.ops import CpuOps
from elastic_ep.engine.ops_cpu.pages import CpuPages
from elastic_ep.engine.sampler import Sampled, sample
from elastic_ep.engine.scheduler import Chunk, Sequence
from elastic_ep.engine.step_runner import NO_SHELF, StepResult, StepRunner, StreamMemory
from elastic_ep.engine.transformer import Transformer
from elastic_ep.exchange.base import Exchange, Received, check_rows
from elastic_ep.exchange.pull import TILE
from elastic_ep.guided.masks import MaskMaker
from elastic_ep.models.spec import ModelSpec
from elastic_ep.placement import Placement
from elastic_ep.weights.bank import Weights
from elastic_ep.wire.messages import SamplingParams

__all__ = ["ModelRunner", "StepResult"]


class ModelRunner(StepRunner):
    """Forward thread only. Raises ValueError if the limits do not fit together."""

    def __init__(
        self,
        limits: EngineLimits,
        weights: Weights,
        placement: Placement,
        rank: int,
        exchange: Exchange,
        device: torch.device | str = "cpu",
        memory: StreamMemory = NO_SHELF,
        masks: MaskMaker | None = None,
    ) -> None:
        if KEY_BLOCK % limits.page_size:
            raise ValueError(f"page size {limits.page_size} does not divide {KEY_BLOCK}")
        check_rows(exchange, weights.embed.dtype)
        self._device = torch.device(device)
        spec = weights.spec
        layout = CacheLayout.of(spec.attention, limits.page_size, limits.cache_pages)
        windows = {layer.attention.window for layer in spec.layers}
        self._batches = BatchMaker(layout, self._device, windows)
        load = ExpertLoad(placement, rank)
        self._ops = CpuOps(spec, layout, limits.max_model_len, self._device, load.by_slot)
        self._model = Transformer(weights, self._ops)
        super().__init__(limits, weights, placement, rank, exchange, self._ops.routing, load, memory, masks)
        self._open_memory(CpuPages(self._ops.caches, layout))
        self._carrier = CountedCarrier(exchange)
        self._batch: Batch | None = None
        self._logits: torch.Tensor | None = None

    def _launch(self, chunks: list[Chunk]) -> None:
        self._batch = None
        self._carrier.begin()
        if not chunks:
            self._model.forward_idle(self._carrier)
            return
        self._batch = self._batches.make(chunks)
        self._logits = self._model.forward(self._batch, self._carrier)

    def _complete(self) -> None:
        layer, dispatched = divmod(self._carrier.performed, 2)
        counted = list(self.load.by_slot[layer]) if dispatched else None
        self._model.complete(None, self.weights.embed[:0], self._carrier)
        if counted is not None:  # they were, when the layer began
            self.load.by_slot[layer][:] = counted

    def _discard(self) -> None:
        if self._batch is not None:
            self._ops.forget(self._batch)

    def _sample(self, sequences: Seq[Sequence]) -> list[Sampled]:
        assert self._logits is not None
        return sample(self._logits, sequences, self._guiding.masks())

    @torch.inference_mode()
    def warm_up(self) -> None:
        """One forward of one tile, and of none, without peers: the first real step must not be slow."""
        self.prove_well()
        self._model.forward_idle(self._alone())
        self.load.take()  # those rows were nobody's

    def prove_well(self) -> None:
        counted = [list(slots) for slots in self.load.by_slot]
        params = SamplingParams(max_tokens=1, temperature=1.0, top_p=0.5, logprobs=1)
        chunks = [Chunk(Sequence(-1, [0, 0], 2, params, 0, 0, pages=[0]), start, 1) for start in range(2)]
        batch = self._batches.make(chunks)
        sample(self._model.forward(batch, self._alone()), [chunks[1].sequence])
        self._ops.forget(batch)
        for slots, before in zip(self.load.by_slot, counted, strict=True):
            slots[:] = before  # those rows were nobody's

    def _alone(self) -> _Alone:
        return _Alone(self.weights.spec, self._placement.slots_per_rank, self._device)


class _Alone:
    """A carrier without peers, for `warm_up`: experts get one tile of zeros, combine gives zeros."""

    def __init__(self, spec: ModelSpec, slots: int, device: torch.device) -> None:
        self._received = Received(
            torch.zeros(slots, TILE, spec.hidden_size, device=device), torch.ones(slots, dtype=torch.int64)
        )
        self._hidden = spec.hidden_size

    def dispatch(self, x: torch.Tensor, physical_experts: torch.Tensor) -> Received:
        return self._received

    def combine(self, y: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return y.new_zeros(len(weights), self._hidden)
