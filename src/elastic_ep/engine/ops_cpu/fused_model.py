"""The forward pass in C++ (fused/engine.cpp): a step is one call, which holds no interpreter lock.

What a row gets is a function of that row, of its sequence's cache and of the weights alone. That is so by the order of
every sum, whatever the processor: no library underneath chooses kernels by shape.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from elastic_ep.config import EngineLimits
from elastic_ep.engine.ops_cpu.batch import CacheLayout
from elastic_ep.engine.ops_cpu.layers import Rope
from elastic_ep.engine.routing_table import RoutingTable
from elastic_ep.engine.scheduler import Chunk
from elastic_ep.exchange.fused import FusedExchange
from elastic_ep.fused.library import BatchState, Fused, LayerState, ModelState
from elastic_ep.models.spec import QkNorm
from elastic_ep.weights.bank import Parts, Weights, expert_parts

_QK_NORMS = {QkNorm.NONE: 0, QkNorm.HEAD: 1, QkNorm.PROJECTION: 2}
_NORMS = {"input_norm", "qk_norm", "post_norm"}
"""Of a layer: float32, whatever its matrices are."""
_WORD = 8
KEYS = 8
"""As in attention.h."""


@dataclass(frozen=True, slots=True)
class FusedBatch:
    state: BatchState
    words: array[int]
    """What `state` points to."""


class FusedModel:
    """Forward thread only. Raises ValueError for pages of a size that it does not know, and for weights that are not laid
    out as it takes them.

    Weights are float32, or bfloat16 if they were stored so: that changes no bit. They stay where they are in memory as
    long as this lives.
    """

    def __init__(self, fused: Fused, weights: Weights, limits: EngineLimits, slots: int) -> None:
        if limits.page_size % KEYS:
            raise ValueError(f"page size {limits.page_size} is no multiple of {KEYS}")
        matrices = weights.embed.dtype
        if matrices not in (torch.float32, torch.bfloat16):
            raise ValueError(f"weights in {matrices}: float32 or bfloat16 expected")
        spec, kind, moe = weights.spec, weights.spec.grouped, weights.spec.moe
        device = torch.device("cpu")
        self._fused = fused
        self._weights = weights
        self._layers = spec.moe_layers
        self.layout = CacheLayout(kind.heads, kind.kv_heads, limits.page_size, limits.cache_pages)
        self.routing = RoutingTable(spec.moe_layers, moe.experts, device)
        self.caches = [torch.zeros(self.layout.rows, kind.head_dim) for _ in spec.layers]
        """Of each layer, rows as `CacheLayout` orders them."""
        self.loads = [array("q", bytes(slots * _WORD)) for _ in spec.layers]
        """[layers][slots]: the rows that each slot has computed are added to it."""
        rope = Rope(kind.rotary, limits.max_model_len, device)
        tokens, hidden, attention = (
            limits.max_num_batched_tokens,
            spec.hidden_size,
            kind.heads * kind.head_dim,
        )
        qkv = attention + 2 * kind.kv_heads * kind.head_dim
        logits = torch.zeros(limits.max_num_seqs, spec.vocab_size)
        self._logits: npt.NDArray[np.float32] = logits.numpy()
        self._kept: dict[str, Any] = {
            "embed": weights.embed,
            "final_norm": weights.final_norm.float(),
            "lm_head": weights.lm_head,
            "cosines": rope.cosines,
            "sines": rope.sines,
            "x": torch.zeros(tokens, hidden),
            "h": torch.zeros(tokens, hidden),
            "mixture": torch.zeros(tokens, hidden),
            "weights": torch.zeros(tokens, moe.top_k),
            "chosen": torch.zeros(tokens, moe.top_k, dtype=torch.int32),
            "logits": logits,
            "wide": torch.zeros(tokens, max(qkv, 2 * moe.inner, hidden)),
            "narrow": torch.zeros(tokens, max(attention, moe.experts, moe.inner, hidden)),
            "line": torch.zeros(limits.sequence_pages * limits.page_size),
        }
        kinds = {"embed": matrices, "lm_head": matrices, "chosen": torch.int32}
        self._layer_parts: list[Parts] = []
        """Kept, as the library has their addresses."""
        self._layer_states = (LayerState * spec.moe_layers)(
            *[self._layer(index) for index in range(spec.moe_layers)]
        )
        self._state = ModelState(
            layer_count=spec.moe_layers,
            hidden=hidden,
            vocab=spec.vocab_size,
            heads=kind.heads,
            kv_heads=kind.kv_heads,
            head_dim=kind.head_dim,
            qk_norm=_QK_NORMS[kind.qk_norm],
            experts=moe.experts,
            top_k=moe.top_k,
            inner=moe.inner,
            renormalise=moe.renormalise,
            slots=slots,
            page_size=limits.page_size,
            pages=limits.cache_pages,
            halves=matrices is torch.bfloat16,
            max_tokens=tokens,
            max_samples=limits.max_num_seqs,
            positions=limits.max_model_len,
            eps=spec.rms_norm_eps,
            clip=float("inf") if kind.clip_qkv is None else kind.clip_qkv,
            layers=ctypes.addressof(self._layer_states),
            **{name: _address(part, kinds.get(name, torch.float32)) for name, part in self._kept.items()},
        )
        self._at = ctypes.pointer(self._state)
        self._nothing = BatchState()

    def _layer(self, index: int) -> LayerState:
        layer = self._weights.spec.layers[index]
        names = [part.name for part in (*layer.dense, *expert_parts(layer))]
        parts = {name: self._weights.layers[index][name] for name in names}
        parts |= {name: parts[name].float() for name in _NORMS & parts.keys()}
        self._layer_parts.append(parts)
        matrices = self._weights.embed.dtype
        return LayerState(
            **{
                name: _address(part, torch.float32 if name in _NORMS else matrices)
                for name, part in parts.items()
            },
            cache=_address(self.caches[index], torch.float32),
            physical=_address(self.routing.physical[index], torch.int64),
            load=self.loads[index].buffer_info()[0],
        )

    def make_batch(self, chunks: Seq[Chunk]) -> FusedBatch:
        ids: list[int] = []
        starts: list[int] = []
        lengths: list[int] = []
        tables: list[int] = []
        pages: list[int] = []
        sampled: list[int] = []
        for sequence, start, length in chunks:
            end = start + length
            ids += sequence.tokens[start:end]
            starts.append(start)
            lengths.append(length)
            tables.append(len(pages))
            pages += sequence.pages
            if end >= sequence.needed:  # as `Chunk.samples`
                sampled.append(len(ids) - 1)
        words = array("q", ids + starts + lengths + tables + pages + sampled)
        at = words.buffer_info()[0]
        tokens, count = len(ids), len(chunks)
        places = [at]
        for size in (tokens, count, count, count, len(pages)):
            places.append(places[-1] + size * _WORD)
        return FusedBatch(BatchState(tokens, count, len(sampled), len(pages), *places), words)

    def forward(self, batch: FusedBatch | None, exchange: FusedExchange) -> npt.NDArray[np.float32]:
        """Logits [samples, V] float32, until the next step. None: of no tokens.

        Raises RuntimeError, with the step's operations to be completed, for what is out of range.
        """
        state = self._nothing if batch is None else batch.state
        self._done(self._fused.forward(self._at, state, exchange.at))
        return self._logits[: state.samples]

    def begin(self) -> None:
        """A step is about to begin: none of its layers has been done."""
        self._state.mixed = 0

    def complete(self, exchange: FusedExchange) -> None:
        """The rest of a step that was begun, as one of no tokens."""
        for index in range(self._state.mixed, self._layers):
            self._done(self._fused.mixture(self._at, exchange.at, index, 0))

    def try_out(self, batch: FusedBatch) -> npt.NDArray[np.float32]:
        """A forward pass without peers, to which experts add nothing."""
        self._kept["mixture"].zero_()
        self._done(self._fused.begin(self._at, batch.state))
        for index in range(self._layers):
            self._fused.attention(self._at, batch.state, index)
        self._fused.logits(self._at, batch.state)
        return self._logits[: batch.state.samples]

    def _done(self, performed: int) -> None:
        if not performed:
            raise RuntimeError("a token, a position, a page or a physical expert out of range")


def _address(tensor: torch.Tensor, dtype: torch.dtype) -> int:
    if tensor.dtype is not dtype or not tensor.is_contiguous():
        raise ValueError(
            f"{tensor.dtype} with strides {tensor.stride()} of {tuple(tensor.shape)}: contiguous {dtype} expected"
        )
    return tensor.data_ptr()
