"""One rank's engine on the processor, its forward pass in C++."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from contextlib import nullcontext

import numpy as np
import numpy.typing as npt

from elastic_ep.config import EngineLimits
from elastic_ep.engine.expert_load import ExpertLoad
from elastic_ep.engine.ops_cpu.fused_model import FusedModel
from elastic_ep.engine.ops_cpu.pages import CpuPages
from elastic_ep.engine.sampler import Sampled, sample
from elastic_ep.engine.scheduler import Chunk, Sequence
from elastic_ep.engine.step_runner import NO_SHELF, StepRunner, StreamMemory
from elastic_ep.exchange.fused import FusedExchange
from elastic_ep.fused.library import Fused
from elastic_ep.guided.masks import MaskMaker
from elastic_ep.kv.page_table import NULL_PAGE
from elastic_ep.placement import Placement
from elastic_ep.weights.bank import Weights
from elastic_ep.wire.messages import SamplingParams


class FusedRunner(StepRunner):
    """Forward thread only. Raises ValueError if limits, weights, placement and exchange do not fit together.

    What a poisoned step leaves in the cache harms nobody: no key is read before its own token has been computed.
    """

    step_mode = nullcontext  # torch computes nothing

    def __init__(
        self,
        fused: Fused,
        limits: EngineLimits,
        weights: Weights,
        placement: Placement,
        rank: int,
        exchange: FusedExchange,
        memory: StreamMemory = NO_SHELF,
        masks: MaskMaker | None = None,
    ) -> None:
        shape = weights.spec.exchange_shape(limits.max_num_batched_tokens, placement)
        if exchange.shape != shape:
            raise ValueError(f"an exchange of {exchange.shape}: {shape} expected")
        self._model = FusedModel(fused, weights, limits, placement.slots_per_rank)
        self._peers = exchange
        load = ExpertLoad(placement, rank, self._model.loads)
        super().__init__(limits, weights, placement, rank, exchange, self._model.routing, load, memory, masks)
        self._open_memory(CpuPages(self._model.caches, self._model.layout))
        self._logits: npt.NDArray[np.float32] | None = None

    def _launch(self, chunks: list[Chunk]) -> None:
        self._model.begin()
        batch = self._model.make_batch(chunks) if chunks else None
        self._logits = self._model.forward(batch, self._peers)

    def _complete(self) -> None:
        self._model.complete(self._peers)

    def _discard(self) -> None:
        pass

    def _sample(self, sequences: Seq[Sequence]) -> list[Sampled]:
        assert self._logits is not None
        return sample(self._logits, sequences, self._guiding.masks())

    def warm_up(self) -> None:
        self.prove_well()

    def prove_well(self) -> None:
        params = SamplingParams(max_tokens=1, temperature=1.0, top_p=0.5, logprobs=1)
        chunk = Chunk(Sequence(-1, [0, 0], 2, params, 0, 0, pages=[NULL_PAGE]), 0, 2)
        sample(self._model.try_out(self._model.make_batch([chunk])), [chunk.sequence])
