"""The operations on a processor: plain torch, on tiles of a fixed number of rows (see layers.py)."""

from __future__ import annotations

from collections.abc import MutableSequence, Sequence

import torch

from elastic_ep.engine.ops_cpu.attention import attend
from elastic_ep.engine.ops_cpu.batch import Batch, CacheLayout
from elastic_ep.engine.ops_cpu.experts import swiglu_experts
from elastic_ep.engine.ops_cpu.layers import RmsNorm, Rope, linear
from elastic_ep.engine.routing_table import RoutingTable
from elastic_ep.exchange.base import Received
from elastic_ep.models.spec import ModelSpec, QkNorm
from elastic_ep.weights.bank import Parts


class CpuOps:
    """`Ops`. `loads` [layers][slots]: the rows that each slot computes are added to it."""

    def __init__(
        self,
        spec: ModelSpec,
        layout: CacheLayout,
        max_len: int,
        device: torch.device,
        loads: Sequence[MutableSequence[int]],
    ) -> None:
        kind = spec.attention
        self.routing = RoutingTable(spec.moe_layers, spec.moe.experts, device)
        self._spec = spec
        self._layout = layout
        self._loads = loads
        self.caches = [
            torch.zeros(layout.rows, layer.attention.head_dim, device=device) for layer in spec.layers
        ]
        """Of each layer, rows as `CacheLayout` orders them."""
        self._rope = Rope(kind.head_dim, kind.rope_theta, max_len, device)
        self._norm = RmsNorm(spec.rms_norm_eps, device)
        self._no_experts = torch.empty(0, spec.moe.top_k, dtype=torch.int64, device=device)
        self._no_weights = torch.empty(0, spec.moe.top_k, device=device)
        self._batch: Batch | None = None
        self._rotation = self._rope.at(torch.empty(0, dtype=torch.int64, device=device))

    def begin(self, step: Batch | None) -> None:
        self._batch = step
        if step is not None:
            self._rotation = self._rope.at(step.positions)

    def forget(self, batch: Batch) -> None:
        """Zero what `batch` wrote. A poisoned step may have left NaN, and zero probability times NaN is NaN."""
        for cache in self.caches:
            cache.index_fill_(0, batch.write_rows, 0.0)

    def embed(self, table: torch.Tensor) -> torch.Tensor:
        return table.index_select(0, self._step.tokens)

    def add_norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if residual is None:
            residual = x
        else:
            residual[: len(x)] += x
        return self._norm(residual, weight), residual

    def linear(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return linear(x, weight)

    def rope_and_write(self, qkv: torch.Tensor, layer: Parts, index: int) -> torch.Tensor:
        kind = self._spec.layers[index].attention
        heads, rotated, dim = kind.heads, kind.heads + kind.kv_heads, kind.head_dim
        parts = qkv.view(len(qkv), -1, dim)
        qk, values = parts[:, :rotated], parts[:, rotated:]
        match kind.qk_norm:
            case QkNorm.HEAD:
                qk = self._norm(qk, layer["qk_norm"])
            case QkNorm.PROJECTION:
                norms = layer["qk_norm"].view(-1).split([heads * dim, kind.kv_heads * dim])
                sides = qkv[:, : rotated * dim].split([len(norm) for norm in norms], dim=1)
                normed = [self._norm(side, norm) for side, norm in zip(sides, norms, strict=True)]
                qk = torch.cat(normed, dim=1).view(-1, rotated, dim)
        if kind.clip_qkv is not None:
            qk, values = (part.clamp(-kind.clip_qkv, kind.clip_qkv) for part in (qk, values))
        qk = self._rope.rotate(qk, *self._rotation)
        kv = torch.cat((qk[:, heads:], values), dim=1)
        self.caches[index].index_copy_(0, self._step.write_rows, kv.view(-1, dim))
        return qk

    def attend(self, queries: torch.Tensor, index: int) -> torch.Tensor:
        return attend(queries, self.caches[index], self._step, self._layout)

    def gate(self, h: torch.Tensor, layer: Parts, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self._batch is None:
            return self._no_experts, self._no_weights
        ffn, count = self._spec.layers[index].ffn, self._batch.num_tokens
        probabilities = torch.softmax(linear(h, layer["gate"]), dim=-1)
        weights, logical = torch.topk(probabilities, ffn.top_k, dim=-1)
        if ffn.renormalise:
            weights /= weights.sum(dim=-1, keepdim=True)
        return torch.take(self.routing.physical[index], logical)[:count], weights[:count]

    def tokens(self, h: torch.Tensor) -> torch.Tensor:
        return h if self._batch is None else h[: self._batch.num_tokens]

    def experts(self, received: Received, layer: Parts, index: int) -> torch.Tensor:
        return swiglu_experts(received, layer["gate_up"], layer["down"], self._loads[index])

    def logits(self, h: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
        rows = self._step.logit_rows
        if len(rows) == 0:
            return h.new_empty(0, head.shape[1])
        return linear(h.index_select(0, rows), head)

    @property
    def _step(self) -> Batch:
        assert self._batch is not None, "a step without tokens has no rows"
        return self._batch
