"""Runners on an exchange of one rank with itself."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from unittest import mock

import torch

from elastic_ep.config import EngineLimits
from elastic_ep.engine.ops_cuda import runner as runner_module
from elastic_ep.engine.ops_cuda.draws import Drawn, Draws
from elastic_ep.engine.ops_cuda.memory import Budget
from elastic_ep.engine.ops_cuda.runner import CudaRunner
from elastic_ep.engine.scheduler import Sequence
from elastic_ep.guided.masks import MaskMaker
from elastic_ep.models import qwen3_moe
from elastic_ep.models.spec import ModelSpec
from elastic_ep.placement import launch_placement
from elastic_ep.weights.bank import Held, Weights, dummy_source
from tests.engine.cuda.conftest import INTERPRETED
from tests.engine.solo import TINY, TINY_CONFIG
from tests.kit.solo_exchange import SoloDeviceExchange

SMALL = qwen3_moe.spec(replace(TINY_CONFIG, num_hidden_layers=1)) if INTERPRETED else TINY
"""A layer takes the interpreter a second a step."""
Logits = dict[tuple[int, int], torch.Tensor]
"""By (request, number of known tokens)."""


def cuda_runner(
    device: torch.device,
    spec: ModelSpec = SMALL,
    limits: EngineLimits | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    graphs: bool = False,
    budget: Budget | None = None,
    masks: MaskMaker | None = None,
) -> tuple[CudaRunner, SoloDeviceExchange]:
    placement = launch_placement(1, spec.moe_layers, spec.moe.experts, 0)
    weights = Weights(spec, placement, 0, dummy_source(spec, 0), device, dtype, held=Held.CODES)
    exchange = SoloDeviceExchange(spec.moe.experts, device, dtype)
    limits = limits or EngineLimits(
        max_model_len=100, max_num_seqs=4, max_num_batched_tokens=24, num_pages=40
    )
    runner = CudaRunner(
        limits, weights, placement, 0, exchange, tile=4, graphs=graphs, budget=budget, masks=masks
    )
    return runner, exchange


@contextmanager
def recorded() -> Iterator[Logits]:
    """Of all that is sampled, greedy too."""
    seen: Logits = {}

    class Recording(Draws):
        def __init__(self, sequences: list[Sequence], device: torch.device, rows: list[int]) -> None:
            super().__init__(sequences, device, rows)
            self._keys = [(seq.request_id, len(seq.tokens)) for seq in sequences]

        def run(self, logits: torch.Tensor, masks: torch.Tensor | None = None) -> Drawn:
            seen.update(zip(self._keys, logits[self._rows].cpu(), strict=True))
            return super().run(logits, masks)

    with (
        mock.patch.object(runner_module, "Draws", Recording),
        mock.patch.object(runner_module, "is_plain_greedy", return_value=False),
    ):
        yield seen
