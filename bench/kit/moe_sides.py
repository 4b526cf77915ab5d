"""The sides of `bench.gpu_moe_layer`: one layer each, by the number of its weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from bench.kit.moe_plane import Plane
from elastic_ep.engine.ops_cuda.kernels.expert_ffn import expert_ffn
from elastic_ep.exchange.base import Received

Layer = Callable[[int], Any]


class Sides:
    """What is compared. Whatever torch needs to know of the counts on the host, it is told for nothing."""

    def __init__(self, plane: Plane) -> None:
        self.plane = plane
        self.received: list[Received] = []
        self.compact: list[torch.Tensor] = []
        self.index: list[torch.Tensor] = []
        self.ends: list[torch.Tensor] = []
        for layer in plane.weights:
            got = plane.raw_dispatch(layer)
            plane.raw_combine(got.packed, layer)
            packed, counts = got.packed.clone(), got.counts.to(torch.int32)
            rows = torch.arange(packed.shape[1], device=plane.device).expand(len(counts), -1)
            flat = packed.reshape(-1, packed.shape[2])
            index = (rows < counts[:, None]).flatten().nonzero().squeeze(1)
            self.received.append(Received(packed, counts))
            self.index.append(index)
            self.compact.append(flat[index])
            self.ends.append(counts.cumsum(0).to(torch.int32))
        capacity = self.received[0].packed.shape[1]
        self.full = torch.arange(1, plane.case.slots + 1, device=plane.device, dtype=torch.int32) * capacity
        # torch's grouped product prefers one or the other order in memory: it may choose.
        self.turned = [
            tuple(w[layer].transpose(1, 2).contiguous().transpose(1, 2) for w in (plane.gate_up, plane.down))
            for layer in plane.weights
        ]

    def all(self) -> dict[str, Layer]:
        return {
            "ours": self._ours,
            "raw_exchange": self._raw,
            "grouped": lambda layer: self._grouped(self.compact[layer], self.ends[layer], layer, False),
            "grouped_turned": lambda layer: self._grouped(self.compact[layer], self.ends[layer], layer, True),
            "ours_experts": lambda layer: self._experts(self.received[layer], layer),
            "raw_with_grouped": lambda layer: self._with_grouped(layer, False),
            "raw_with_grouped_turned": lambda layer: self._with_grouped(layer, True),
            "raw_with_grouped_padded": self._padded,
        }

    def _ours(self, layer: int) -> torch.Tensor:
        plane = self.plane
        received = plane.exchange.dispatch(plane.x, plane.chosen[layer])
        return plane.exchange.combine(self._experts(received, layer), plane.mixing[layer])

    def _experts(self, received: Received, layer: int) -> torch.Tensor:
        plane = self.plane
        return expert_ffn(
            received.packed,
            received.counts,
            plane.gate_up[layer],
            plane.down[layer],
            expected_rows=plane.expected,
        )

    def _raw(self, layer: int) -> torch.Tensor:
        return self.plane.raw_combine(self.plane.raw_dispatch(layer).packed, layer)

    def _grouped(self, x: torch.Tensor, ends: torch.Tensor, layer: int, turned: bool) -> torch.Tensor:
        plane = self.plane
        gate_up, down = self.turned[layer] if turned else (plane.gate_up[layer], plane.down[layer])
        gated, up = torch._grouped_mm(x, gate_up, offs=ends).chunk(2, dim=-1)
        return torch._grouped_mm(functional.silu(gated) * up, down, offs=ends)

    def _with_grouped(self, layer: int, turned: bool) -> torch.Tensor:
        """The rows gathered from the padded layout, and scattered back into it."""
        packed, index = self.plane.raw_dispatch(layer).packed, self.index[layer]
        flat = packed.view(-1, packed.shape[2])
        y = self._grouped(flat.index_select(0, index), self.ends[layer], layer, turned)
        return self.plane.raw_combine(torch.empty_like(flat).index_copy_(0, index, y).view_as(packed), layer)

    def _padded(self, layer: int) -> torch.Tensor:
        """Unused rows computed along."""
        packed = self.plane.raw_dispatch(layer).packed
        y = self._grouped(packed.view(-1, packed.shape[2]), self.full, layer, False)
        return self.plane.raw_combine(y.view_as(packed), layer)
