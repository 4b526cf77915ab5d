"""CUDA graphs of a step, one for each shape: replayed as they were captured, whoever takes part by then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from elastic_ep.engine.ops_cuda.inputs import StepShape


class StepGraphs:
    """`body` computes a step of a shape into tensors, which a replay overwrites.

    HAZARD: a capture executes nothing, but the exchange counts its operations as performed (see exchange/mooncake.py).
    """

    def __init__(self, body: Callable[[StepShape], tuple[torch.Tensor, torch.Tensor]]) -> None:
        self._body = body
        self._graphs: dict[StepShape, torch.cuda.CUDAGraph] = {}
        self._outputs: dict[StepShape, tuple[torch.Tensor, torch.Tensor]] = {}
        self._pool: Any = None

    def capture(self, shape: StepShape) -> None:
        """The body must have run for this shape: the first call compiles. All graphs share one memory pool."""
        graph = torch.cuda.CUDAGraph()
        # Other threads (a mask, a copied expert) may use the device meanwhile.
        with torch.cuda.graph(
            graph,
            pool=self._pool,
            stream=torch.cuda.current_stream(),
            capture_error_mode="thread_local",
        ):
            self._outputs[shape] = self._body(shape)
        self._pool = graph.pool()
        self._graphs[shape] = graph

    def run(self, shape: StepShape) -> tuple[torch.Tensor, torch.Tensor]:
        """Replay, or without a graph compute eagerly. Waits for nothing."""
        graph = self._graphs.get(shape)
        if graph is None:
            return self._body(shape)
        graph.replay()
        return self._outputs[shape]
