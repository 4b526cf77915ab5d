"""The operations on a processor: plain torch, on tiles of a fixed number of rows (see layers.py)."""

from __future__ import annotations

from collections.abc import MutableSequence, Sequence

import torch

from elastic_ep.engine.ops_cpu.attention import attend
from elastic_ep.engine.ops_cpu.batch import Batch, CacheLayout
from elastic_ep.engine.ops_cpu.experts import feed_forward, gated_experts
from elastic_ep.engine.ops_cpu.gate import choose, weighed
from elastic_ep.engine.ops_cpu.layers import LayerNorm, RmsNorm, Rope, Rotation, by_head, linear
from elastic_ep.engine.rotary import temperatures
from elastic_ep.engine.routing_table import RoutingTable
from elastic_ep.exchange.base import Received
from elastic_ep.models.spec import (
    AnyAttention,
    Attention,
    LatentAttention,
    ModelSpec,
    Moe,
    Norm,
    QkNorm,
    Rotary,
    Temperature,
)
from elastic_ep.weights.bank import Parts


class CpuOps:
    """`Ops`. `loads` [mixtures][slots]: the rows that each slot computes are added to it."""

    def __init__(
        self,
        spec: ModelSpec,
        layout: CacheLayout,
        max_len: int,
        device: torch.device,
        loads: Sequence[MutableSequence[int]],
    ) -> None:
        self.routing = RoutingTable(spec.moe_layers, spec.moe.experts, device)
        self._spec = spec
        self._layout = layout
        self._loads = loads
        self._moes: list[Moe] = [spec.moe_of(mixture) for mixture in range(spec.moe_layers)]
        width = spec.attention.kv_elements // layout.planes
        self.caches = [torch.zeros(layout.rows, width, device=device) for _ in spec.layers]
        """Of each layer, rows as `CacheLayout` orders them."""
        kinds = {layer.attention.rotary for layer in spec.layers}
        tempered = {one for layer in spec.layers if (one := _temperature(layer.attention))}
        self._temperatures = {kind: temperatures(kind, max_len).to(device) for kind in tempered}
        self._ropes = {kind: Rope(kind, max_len, device) for kind in kinds if kind.dim}
        self._norm = RmsNorm(spec.rms_norm_eps, device)
        self._layer_norm = LayerNorm(spec.rms_norm_eps)
        kind = spec.attention
        latent_eps = kind.norm_eps if isinstance(kind, LatentAttention) else spec.rms_norm_eps
        self._latent_norm = RmsNorm(latent_eps, device)
        self._no_experts = torch.empty(0, spec.moe.top_k, dtype=torch.int64, device=device)
        self._no_weights = torch.empty(0, spec.moe.top_k, device=device)
        self._batch: Batch | None = None
        self._rotations: dict[Rotary, Rotation] = {}

    def begin(self, step: Batch | None) -> None:
        self._batch = step
        if step is not None:
            self._rotations = {kind: rope.at(step.positions) for kind, rope in self._ropes.items()}

    def forget(self, batch: Batch) -> None:
        """Zero what `batch` wrote. A poisoned step may have left NaN, and zero probability times NaN is NaN."""
        for cache in self.caches:
            cache.index_fill_(0, batch.write_rows, 0.0)

    def embed(self, table: torch.Tensor) -> torch.Tensor:
        x = table.index_select(0, self._step.tokens)
        return x if self._spec.embed_factor == 1 else x * self._spec.embed_factor

    def add_norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, parts: Parts, name: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if residual is None:
            residual = x
        else:
            residual[: len(x)].add_(x, alpha=self._spec.branch_factor)
        if self._spec.norm is Norm.LAYER:
            return self._layer_norm(residual, parts[name], parts[f"{name}_bias"]), residual
        return self._norm(residual, parts[name]), residual

    def linear(self, x: torch.Tensor, parts: Parts, name: str) -> torch.Tensor:
        return linear(x, parts[name], parts.get(f"{name}_bias"))

    def project(self, h: torch.Tensor, layer: Parts, index: int) -> torch.Tensor:
        kind = self._spec.layers[index].attention
        if isinstance(kind, LatentAttention):
            return self._project_latents(h, layer, index, kind)
        return self._project_heads(self.linear(h, layer, "qkv"), layer, index, kind)

    def _project_heads(self, qkv: torch.Tensor, layer: Parts, index: int, kind: Attention) -> torch.Tensor:
        """Queries and keys: [R, Hq + Hk, D]"""
        heads, rotated, dim = kind.heads, kind.heads + kind.kv_heads, kind.head_dim
        parts = qkv.view(len(qkv), -1, dim)
        qk, values = parts[:, :rotated], parts[:, rotated:]
        match kind.qk_norm:
            case QkNorm.HEAD | QkNorm.UNWEIGHTED:
                qk = self._norm(qk, layer.get("qk_norm"))
            case QkNorm.PROJECTION:
                norms = layer["qk_norm"].view(-1).split([heads * dim, kind.kv_heads * dim])
                sides = qkv[:, : rotated * dim].split([len(norm) for norm in norms], dim=1)
                normed = [self._norm(side, norm) for side, norm in zip(sides, norms, strict=True)]
                qk = torch.cat(normed, dim=1).view(-1, rotated, dim)
        if kind.clip_qkv is not None:
            qk, values = (part.clamp(-kind.clip_qkv, kind.clip_qkv) for part in (qk, values))
        qk = self._rotate(qk, kind.rotary)
        kv = torch.cat((qk[:, heads:], values), dim=1)
        self.caches[index].index_copy_(0, self._step.write_rows, kv.view(-1, dim))
        if kind.temperature is None:
            return qk
        factors = self._temperatures[kind.temperature].index_select(0, self._step.positions)
        return torch.cat((qk[:, :heads] * factors[:, None, None], qk[:, heads:]), dim=1)

    def _project_latents(
        self, h: torch.Tensor, layer: Parts, index: int, kind: LatentAttention
    ) -> torch.Tensor:
        """Queries as the latents see them, and the key that all heads share: [R, Hq + 1, kv_rank + rope]"""
        of_keys = kind.kv_rank + kind.rope
        made = self.linear(h, layer, "latents")
        queries, latent, turned = made.split([made.shape[1] - of_keys, kind.kv_rank, kind.rope], dim=1)
        if kind.q_rank is not None:
            queries = linear(self._latent_norm(queries, layer["q_norm"]), layer["q_b"])
        plain, rotated = queries.view(len(h), kind.heads, -1).split([kind.nope, kind.rope], dim=2)
        to_keys, _ = self._of_heads(layer, kind)
        turning = torch.cat((rotated, turned.unsqueeze(1)), dim=1)
        latents = self._latent_norm(latent, layer["kv_norm"]).unsqueeze(1)
        seen = torch.cat((by_head(plain.contiguous(), to_keys), latents), dim=1)
        qk = torch.cat((seen, self._rotate(turning, kind.rotary)), dim=2)
        self.caches[index].index_copy_(0, self._step.write_rows, qk[:, kind.heads])
        return qk

    @staticmethod
    def _of_heads(layer: Parts, kind: LatentAttention) -> tuple[torch.Tensor, torch.Tensor]:
        """What makes a head's keys [Hq, nope, kv_rank] of latents, and its values [Hq, kv_rank, value]."""
        by_head = layer["kv_b"].view(kind.heads, kind.nope + kind.value, kind.kv_rank)
        return by_head[:, : kind.nope], by_head[:, kind.nope :].transpose(1, 2)

    def _rotate(self, x: torch.Tensor, kind: Rotary) -> torch.Tensor:
        return self._ropes[kind].rotate(x, *self._rotations[kind]) if kind.dim else x

    def attend(self, queries: torch.Tensor, layer: Parts, index: int) -> torch.Tensor:
        kind, step = self._spec.layers[index].attention, self._step
        out = attend(
            queries,
            self.caches[index],
            step,
            self._layout,
            step.biases[kind.window],
            kind.score_scale,
            value_dim=kind.kv_rank if isinstance(kind, LatentAttention) else kind.head_dim,
            sinks=layer.get("sinks"),
        )
        if isinstance(kind, LatentAttention):
            _, to_values = self._of_heads(layer, kind)
            out = by_head(out.view(len(out), kind.heads, -1), to_values).flatten(1)
        return out

    def feed_forward(self, h: torch.Tensor, layer: Parts) -> torch.Tensor:
        return feed_forward(h, layer)

    def gate(self, h: torch.Tensor, layer: Parts, mixture: int) -> tuple[torch.Tensor, torch.Tensor]:
        if self._batch is None:
            return self._no_experts, self._no_weights
        count = self._batch.num_tokens
        logits = self.linear(h, layer, "gate")
        weights, logical = choose(logits, self._moes[mixture], layer.get("gate_correction"))
        return torch.take(self.routing.physical[mixture], logical)[:count], weights[:count]

    def rows(self, h: torch.Tensor, weights: torch.Tensor, mixture: int) -> tuple[torch.Tensor, torch.Tensor]:
        sent = h if self._batch is None else h[: self._batch.num_tokens]
        return weighed(sent, weights) if self._moes[mixture].gate.into else (sent, weights)

    def experts(self, received: Received, layer: Parts, mixture: int) -> torch.Tensor:
        return gated_experts(received, layer, self._loads[mixture], self._moes[mixture].activation)

    def add_shared(self, mixed: torch.Tensor, h: torch.Tensor, layer: Parts, mixture: int) -> torch.Tensor:
        shared = self._moes[mixture].shared
        if shared is None:
            return mixed
        out = feed_forward(h, layer, "shared_")
        if shared.gated:
            out = torch.sigmoid(linear(h, layer["shared_gate"])) * out
        return mixed + out[: len(mixed)]

    def logits(self, h: torch.Tensor, outside: Parts) -> torch.Tensor:
        rows = self._step.logit_rows
        if len(rows) == 0:
            return h.new_empty(0, outside["lm_head"].shape[1])
        logits = self.linear(h.index_select(0, rows), outside, "lm_head")
        return logits if self._spec.logits_divisor == 1 else logits / self._spec.logits_divisor

    @property
    def _step(self) -> Batch:
        assert self._batch is not None, "a step without tokens has no rows"
        return self._batch


def _temperature(kind: AnyAttention) -> Temperature | None:
    return kind.temperature if isinstance(kind, Attention) else None
