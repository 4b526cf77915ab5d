"""The operations in kernels. They read all that changes from step to step from device memory, and never wait.

So a forward pass may be captured as it is, and whatever it is called for (one sequence, many, none) is a matter of its
inputs.
"""

from __future__ import annotations

import torch

from elastic_ep.config import EngineLimits
from elastic_ep.engine.ops_cuda.inputs import StepInputs, StepShape
from elastic_ep.engine.ops_cuda.kernels.decode_attention import decode_attention
from elastic_ep.engine.ops_cuda.kernels.dense import dense
from elastic_ep.engine.ops_cuda.kernels.expert_ffn import Scaled, expert_ffn
from elastic_ep.engine.ops_cuda.kernels.gate import gate
from elastic_ep.engine.ops_cuda.kernels.norm_rope import add_rms_norm, norm_rope_write
from elastic_ep.engine.ops_cuda.kernels.prefill_attention import prefill_attention
from elastic_ep.engine.rotary import rotary_table
from elastic_ep.engine.routing_table import RoutingTable
from elastic_ep.exchange.base import Received
from elastic_ep.models.formats import Fp8
from elastic_ep.models.spec import ModelSpec, QkNorm
from elastic_ep.weights.bank import Parts


class CudaOps:
    """`Ops`. `load` [layers, slots] int32 counts rows."""

    def __init__(
        self,
        spec: ModelSpec,
        limits: EngineLimits,
        inputs: StepInputs,
        num_ranks: int,
        slots: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """The KV cache has `limits.cache_pages`, or what `resize` says afterwards."""
        self.routing = RoutingTable(spec.moe_layers, spec.moe.experts, device)
        self._spec = spec
        self._inputs = inputs
        self._rows_per_expert = num_ranks * spec.moe.top_k / spec.moe.experts
        kind = self._kind = spec.grouped
        self._moes = [spec.moe_of(mixture) for mixture in range(spec.moe_layers)]
        size = (limits.cache_pages, kind.kv_heads, limits.page_size, kind.head_dim)
        self.caches = torch.zeros(len(spec.layers), 2, *size, dtype=dtype, device=device)
        """[layers, 2 (keys, values), pages, Hk, page size, D]"""
        cosines, sines = rotary_table(kind.rotary, limits.max_model_len)
        self._cos, self._sin = cosines.to(device), sines.to(device)
        self.load = torch.zeros(spec.moe_layers, slots, dtype=torch.int32, device=device)
        self._counts: list[torch.Tensor] = []
        """Of the step's layers so far: the rows [slots] or [slots, parts] that this rank's experts had."""
        self._shape = StepShape(0, decode=True)

    def resize(self, pages: int) -> None:
        """Another KV cache, empty and of so many pages, the null page included. Before any graph is captured."""
        layers, sides, _, *page = self.caches.shape
        like = self.caches
        del self.caches
        self.caches = like.new_zeros(layers, sides, pages, *page)

    def begin(self, step: StepShape | None) -> None:
        """A step without tokens has a shape like any other: its rows are padding."""
        assert step is not None
        self._shape = step
        self._counts = []

    def embed(self, table: torch.Tensor) -> torch.Tensor:
        return table.index_select(0, self._inputs.tokens[: self._shape.rows])

    def add_norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, parts: Parts, name: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return add_rms_norm(x, residual, parts[name], self._spec.rms_norm_eps)

    def linear(self, x: torch.Tensor, parts: Parts, name: str) -> torch.Tensor:
        return dense(x, parts[name])

    def project(self, h: torch.Tensor, layer: Parts, index: int) -> torch.Tensor:
        inputs, rows, kind = self._inputs, self._shape.rows, self._kind
        qkv = self.linear(h, layer, "qkv")
        keys, values = self.caches[index]
        norm = layer["qk_norm"] if kind.qk_norm is QkNorm.HEAD else None
        if kind.qk_norm is QkNorm.PROJECTION:
            qkv = self._norm_projections(qkv, layer["qk_norm"].view(-1), kind.heads * kind.head_dim)
        return norm_rope_write(
            qkv,
            norm,
            self._cos,
            self._sin,
            inputs.positions[:rows],
            inputs.slots[:rows],
            keys,
            values,
            self._spec.rms_norm_eps,
            clip=kind.clip_qkv,
        )

    def _norm_projections(self, qkv: torch.Tensor, weight: torch.Tensor, queries: int) -> torch.Tensor:
        q, k, v = qkv.split([queries, len(weight) - queries, qkv.shape[1] - len(weight)], dim=1)
        eps = self._spec.rms_norm_eps
        q, _ = add_rms_norm(q.contiguous(), None, weight[:queries], eps)
        k, _ = add_rms_norm(k.contiguous(), None, weight[queries:], eps)
        return torch.cat((q, k, v), dim=1)

    def attend(self, queries: torch.Tensor, layer: Parts, index: int) -> torch.Tensor:
        inputs, rows = self._inputs, self._shape.rows
        keys, values = self.caches[index]
        if self._shape.decode:
            out = decode_attention(queries, keys, values, inputs.tables[:rows], inputs.lengths[:rows])
        else:
            out = prefill_attention(queries, keys, values, inputs.tables, inputs.bounds, inputs.lengths)
        return out.view(rows, -1)

    def feed_forward(self, h: torch.Tensor, layer: Parts) -> torch.Tensor:
        raise NotImplementedError

    def gate(self, h: torch.Tensor, layer: Parts, mixture: int) -> tuple[torch.Tensor, torch.Tensor]:
        ffn = self._moes[mixture]
        return gate(
            dense(h, layer["gate"], out_dtype=torch.float32),
            self.routing.physical[mixture],
            ffn.top_k,
            renormalise=ffn.renormalise,
            num_tokens=self._inputs.count,
        )

    def tokens(self, h: torch.Tensor) -> torch.Tensor:
        return h

    def experts(self, received: Received, layer: Parts, mixture: int) -> torch.Tensor:
        self._counts.append(received.counts)
        expected = max(1, round(self._shape.rows * self._rows_per_expert))
        packed = received.packed  # the results take the places of the rows
        gate_up, down = (self._matrices(layer, mixture, name) for name in ("gate_up", "down"))
        return expert_ffn(packed, received.counts, gate_up, down, expected_rows=expected, out=packed)

    def _matrices(self, layer: Parts, mixture: int, name: str) -> torch.Tensor | Scaled:
        """Of all slots: numbers, or the codes that a quantised checkpoint has."""
        if name in layer:
            return layer[name]
        (part,) = (part for part in self._moes[mixture].parts if part.name == name)
        made = part.pieces[0].format
        assert isinstance(made, Fp8), "other codes are refused, or widened as they are loaded"
        return Scaled(layer[f"{name}.codes"], layer[f"{name}.scales"], made.rows, made.columns)

    def add_shared(self, mixed: torch.Tensor, h: torch.Tensor, layer: Parts, mixture: int) -> torch.Tensor:
        return mixed

    def logits(self, h: torch.Tensor, outside: Parts) -> torch.Tensor:
        """Row i is of the last token of sequence i; rows of no sequence are undefined.

        Sums are not rounded to the weights' type before they are compared; nor are the gate's.
        """
        counts = torch.stack(self._counts)
        self.load += counts if counts.dim() == 2 else counts.sum(-1, dtype=torch.int32)
        last = h
        if not self._shape.decode:
            last = h.index_select(0, self._inputs.last_rows[: self._shape.sequences])
        return dense(last, outside["lm_head"], out_dtype=torch.float32)
