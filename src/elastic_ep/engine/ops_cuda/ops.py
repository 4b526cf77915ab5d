"""The operations in kernels. They read all that changes from step to step from device memory, and never wait.

So a forward pass may be captured as it is, and whatever it is called for (one sequence, many, none) is a matter of its
inputs.
"""

from __future__ import annotations

import torch
from torch.nn import functional

from elastic_ep.config import EngineLimits
from elastic_ep.engine.ops_cpu.gate import choose, weighed
from elastic_ep.engine.ops_cuda.inputs import TILE_ROWS, StepInputs, StepShape
from elastic_ep.engine.ops_cuda.kernels.by_head import by_head
from elastic_ep.engine.ops_cuda.kernels.decode_attention import decode_attention
from elastic_ep.engine.ops_cuda.kernels.dense import dense
from elastic_ep.engine.ops_cuda.kernels.dense_codes import DenseCodes, dense_codes
from elastic_ep.engine.ops_cuda.kernels.expert_ffn import Scaled, expert_ffn
from elastic_ep.engine.ops_cuda.kernels.gate import gate, has_gate
from elastic_ep.engine.ops_cuda.kernels.latent_attention import latent_decode, latent_prefill
from elastic_ep.engine.ops_cuda.kernels.latent_write import latent_write
from elastic_ep.engine.ops_cuda.kernels.norm_rope import add_rms_norm, norm_rope_write
from elastic_ep.engine.ops_cuda.kernels.prefill_attention import prefill_attention
from elastic_ep.engine.rotary import rotary_table, temperatures
from elastic_ep.engine.routing_table import RoutingTable
from elastic_ep.exchange.base import Received
from elastic_ep.models.spec import AnyAttention, Attention, LatentAttention, ModelSpec, Norm, QkNorm
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
        kind = spec.attention
        self._kinds = [layer.attention for layer in spec.layers]
        self._moes = [spec.moe_of(mixture) for mixture in range(spec.moe_layers)]
        sides, heads, dim = _cached(kind)
        size = (sides, limits.cache_pages, heads, limits.page_size, dim)
        self.caches = torch.zeros(len(spec.layers), *size, dtype=dtype, device=device)
        """[layers, 2 (keys, values), pages, Hk, page size, D]; of latents
        [layers, 1, pages, 1, page size, kv_rank + rope]"""
        length = limits.max_model_len
        self._rotations = {
            rotary: tuple(table.to(device) for table in rotary_table(rotary, length))
            for rotary in {one.rotary for one in self._kinds}
        }
        self._temperatures = {
            one: temperatures(one, length).to(device)
            for one in {kind.temperature for kind in self._kinds if isinstance(kind, Attention)}
            if one
        }
        rows = max(limits.max_num_batched_tokens, limits.max_num_seqs) + TILE_ROWS
        self._rows = torch.arange(rows, device=device)
        self._ones = torch.ones(kind.heads + heads, dim, dtype=dtype, device=device)
        self.load = torch.zeros(spec.moe_layers, slots, dtype=torch.int32, device=device)
        outputs, vocabulary = inputs.max_sequences, spec.vocab_size
        self._logits = torch.zeros(outputs, vocabulary, dtype=torch.float32, device=device)
        """Of the step. One for all graphs, which are never at work at the same time: they are large."""
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
        x = table.index_select(0, self._inputs.tokens[: self._shape.rows])
        return x if self._spec.embed_factor == 1 else x * self._spec.embed_factor

    def add_norm(
        self, x: torch.Tensor, residual: torch.Tensor | None, parts: Parts, name: str
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if residual is not None and self._spec.branch_factor != 1:
            x = x * self._spec.branch_factor
        if self._spec.norm is Norm.LAYER:
            total = x if residual is None else x + residual
            weight, bias = parts[name], parts[f"{name}_bias"]
            return functional.layer_norm(total, weight.shape, weight, bias, self._spec.rms_norm_eps), total
        return add_rms_norm(x, residual, parts[name], self._spec.rms_norm_eps)

    def linear(self, x: torch.Tensor, parts: Parts, name: str) -> torch.Tensor:
        return self._product(x, parts, name)

    def _product(
        self,
        x: torch.Tensor,
        parts: Parts,
        name: str,
        out_dtype: torch.dtype | None = None,
        into: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if name in parts:
            y = dense(x, parts[name], out_dtype=out_dtype, into=into)
        else:  # neither the gate nor the head
            y = dense_codes(x, DenseCodes(parts[f"{name}.codes"], parts[f"{name}.scales"]))
        bias = parts.get(f"{name}_bias")
        return y if bias is None else y.add_(bias)

    def project(self, h: torch.Tensor, layer: Parts, index: int) -> torch.Tensor:
        kind = self._kinds[index]
        if isinstance(kind, LatentAttention):
            return self._project_latents(h, layer, index, kind)
        return self._project_heads(h, layer, index, kind)

    def _project_latents(
        self, h: torch.Tensor, layer: Parts, index: int, kind: LatentAttention
    ) -> torch.Tensor:
        """Queries as the latents see them: [R, Hq, kv_rank + rope]"""
        inputs, rows = self._inputs, self._shape.rows
        made = self.linear(h, layer, "latents")
        first = made.shape[1] - kind.kv_elements
        queries = made[:, :first]
        if kind.q_rank is not None:
            normed, _ = add_rms_norm(queries.contiguous(), None, layer["q_norm"], kind.norm_eps)
            queries = self.linear(normed, layer, "q_b")
        plain, rotated = queries.unflatten(1, (kind.heads, -1)).split([kind.nope, kind.rope], dim=2)
        seen = made.new_empty(rows, kind.heads, kind.kv_elements)
        cosines, sines = self._rotations[kind.rotary]
        latent_write(
            made[:, first:],
            layer["kv_norm"],
            rotated,
            cosines,
            sines,
            inputs.positions[:rows],
            inputs.slots[:rows],
            self._latents(index),
            seen,
            kind.norm_eps,
            interleaved=kind.rotary.interleaved,
        )
        to_keys, _ = _of_heads(layer, kind)
        by_head(plain, to_keys, seen[..., : kind.kv_rank])
        return seen

    def _latents(self, index: int) -> torch.Tensor:
        """[pages, page size, kv_rank + rope]"""
        return self.caches[index, 0, :, 0]

    def _project_heads(self, h: torch.Tensor, layer: Parts, index: int, kind: Attention) -> torch.Tensor:
        inputs, rows = self._inputs, self._shape.rows
        qkv = self.linear(h, layer, "qkv")
        keys, values = self.caches[index]
        norm = layer["qk_norm"] if kind.qk_norm is QkNorm.HEAD else None
        if kind.qk_norm is QkNorm.UNWEIGHTED:
            norm = self._ones
        if kind.qk_norm is QkNorm.PROJECTION:
            qkv = self._norm_projections(qkv, layer["qk_norm"].view(-1), kind.heads * kind.head_dim)
        cosines, sines = self._rotations[kind.rotary]
        positions = inputs.positions[:rows]
        queries = norm_rope_write(
            qkv,
            norm,
            cosines,
            sines,
            positions,
            inputs.slots[:rows],
            keys,
            values,
            self._spec.rms_norm_eps,
            clip=kind.clip_qkv,
            interleaved=kind.interleaved,
        )
        if kind.temperature is None:
            return queries
        factors = self._temperatures[kind.temperature].index_select(0, positions)
        return (queries * factors[:, None, None]).to(queries.dtype)

    def _norm_projections(self, qkv: torch.Tensor, weight: torch.Tensor, queries: int) -> torch.Tensor:
        q, k, v = qkv.split([queries, len(weight) - queries, qkv.shape[1] - len(weight)], dim=1)
        eps = self._spec.rms_norm_eps
        q, _ = add_rms_norm(q.contiguous(), None, weight[:queries], eps)
        k, _ = add_rms_norm(k.contiguous(), None, weight[queries:], eps)
        return torch.cat((q, k, v), dim=1)

    def attend(self, queries: torch.Tensor, layer: Parts, index: int) -> torch.Tensor:
        kind = self._kinds[index]
        if isinstance(kind, LatentAttention):
            return self._attend_latents(queries, layer, index, kind)
        inputs, rows = self._inputs, self._shape.rows
        keys, values = self.caches[index]
        scale, window, sinks = kind.score_scale, kind.window, layer.get("sinks")
        if self._shape.decode:
            places = inputs.tables[:rows], inputs.lengths[:rows]
            out = decode_attention(queries, keys, values, *places, scale=scale, window=window, sinks=sinks)
        else:
            all_places = inputs.tables, inputs.bounds, inputs.lengths
            out = prefill_attention(
                queries, keys, values, *all_places, scale=scale, window=window, sinks=sinks
            )
        return out.view(rows, -1)

    def _attend_latents(
        self, queries: torch.Tensor, layer: Parts, index: int, kind: LatentAttention
    ) -> torch.Tensor:
        inputs, rows, latents = self._inputs, self._shape.rows, self._latents(index)
        rank, scale = kind.kv_rank, kind.score_scale
        if self._shape.decode:
            places = inputs.tables[:rows], inputs.lengths[:rows]
            out = latent_decode(queries, latents, *places, rank=rank, scale=scale)
        else:
            all_places = inputs.tables, inputs.bounds, inputs.lengths
            out = latent_prefill(queries, latents, *all_places, rank=rank, scale=scale)
        _, to_values = _of_heads(layer, kind)
        return by_head(out, to_values).flatten(1)

    def feed_forward(self, h: torch.Tensor, layer: Parts) -> torch.Tensor:
        return self._gated(h, layer, "")

    def _gated(self, h: torch.Tensor, layer: Parts, prefix: str) -> torch.Tensor:
        """The FFN whose parameters have names that begin with `prefix`."""
        gated, up = self._product(h, layer, f"{prefix}gate_up").chunk(2, dim=-1)
        return self._product(functional.silu(gated).mul_(up), layer, f"{prefix}down")

    def gate(self, h: torch.Tensor, layer: Parts, mixture: int) -> tuple[torch.Tensor, torch.Tensor]:
        ffn, physical, count = self._moes[mixture], self.routing.physical[mixture], self._inputs.count
        logits = self._product(h, layer, "gate", torch.float32)
        correction = layer.get("gate_correction")
        if has_gate(ffn):
            return gate(
                logits,
                physical,
                ffn.top_k,
                renormalise=ffn.renormalise,
                num_tokens=count,
                kind=ffn.gate,
                correction=correction,
            )
        weights, logical = choose(logits, ffn, correction)
        real = (self._rows[: len(logits)] < count)[:, None]
        return torch.where(real, physical[logical], -1), torch.where(real, weights, 0.0)

    def rows(self, h: torch.Tensor, weights: torch.Tensor, mixture: int) -> tuple[torch.Tensor, torch.Tensor]:
        return weighed(h, weights) if self._moes[mixture].gate.into else (h, weights)

    def experts(self, received: Received, layer: Parts, mixture: int) -> torch.Tensor:
        self._counts.append(received.counts)
        expected = max(1, round(self._shape.rows * self._rows_per_expert))
        packed = received.packed  # the results take the places of the rows
        gate_up, down = (self._matrices(layer, mixture, name) for name in ("gate_up", "down"))
        biases = (layer["gate_up_bias"], layer["down_bias"]) if "gate_up_bias" in layer else None
        return expert_ffn(
            packed,
            received.counts,
            gate_up,
            down,
            biases=biases,
            activation=self._moes[mixture].activation,
            expected_rows=expected,
            out=packed,
        )

    def _matrices(self, layer: Parts, mixture: int, name: str) -> torch.Tensor | Scaled:
        """Of all slots: numbers, or the codes that a quantised checkpoint has."""
        if name in layer:
            return layer[name]
        (part,) = (part for part in self._moes[mixture].parts if part.name == name)
        piece = part.pieces[0]
        zeros = layer.get(f"{name}.zeros")
        codes, scales = layer[f"{name}.codes"], layer[f"{name}.scales"]
        return Scaled(codes, scales, piece.format, zeros)

    def add_shared(self, mixed: torch.Tensor, h: torch.Tensor, layer: Parts, mixture: int) -> torch.Tensor:
        shared = self._moes[mixture].shared
        if shared is None:
            return mixed
        out = self._gated(h, layer, "shared_")
        if shared.gated:
            out *= torch.sigmoid(dense(h, layer["shared_gate"]))
        return (mixed + out[: len(mixed)]).to(mixed.dtype)

    def logits(self, h: torch.Tensor, outside: Parts) -> torch.Tensor:
        """Row i is of the last token of sequence i; rows of no sequence are undefined. Valid until the next step.

        Sums are not rounded to the weights' type before they are compared; nor are the gate's.
        """
        counts = torch.stack(self._counts)
        self.load += counts if counts.dim() == 2 else counts.sum(-1, dtype=torch.int32)
        last = h
        if not self._shape.decode:
            last = h.index_select(0, self._inputs.last_rows[: self._shape.sequences])
        logits = self._product(last, outside, "lm_head", into=self._logits[: self._shape.outputs])
        return logits if self._spec.logits_divisor == 1 else logits.div_(self._spec.logits_divisor)


def _cached(kind: AnyAttention) -> tuple[int, int, int]:
    """Sides, heads, and numbers of a head that a token has in the KV cache."""
    if isinstance(kind, LatentAttention):
        return 1, 1, kind.kv_elements
    return 2, kind.kv_heads, kind.head_dim


def _of_heads(layer: Parts, kind: LatentAttention) -> tuple[torch.Tensor, torch.Tensor]:
    """What makes a head's keys [Hq, nope, kv_rank] of latents, and its values [Hq, kv_rank, value]."""
    by_head = layer["kv_b"].view(kind.heads, kind.nope + kind.value, kind.kv_rank)
    return by_head[:, : kind.nope], by_head[:, kind.nope :].transpose(1, 2)
