"""What a model family says of itself: kinds of attention and FFN by layer, parameters, and where a checkpoint has them.

Plain data, standard library only: the run process plans with it, and the engine runs any spec over its operations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from enum import Enum

from elastic_ep.exchange.base import ExchangeShape
from elastic_ep.placement import Placement

KV_ITEM = {"cpu": 4, "cuda": 2}
"""Bytes of a number in the KV cache: float32 and bfloat16."""


class QkNorm(Enum):
    """What of queries and keys is normed before they are rotated."""

    NONE = "none"
    HEAD = "head"
    """Each head by itself."""
    PROJECTION = "projection"
    """All heads of a token together: queries, and keys."""


@dataclass(frozen=True, slots=True)
class Attention:
    """Grouped-query attention with rotary embeddings, the rotate-half form: pairs are (i, i + D/2)."""

    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float
    qk_norm: QkNorm
    clip_qkv: float | None = None
    """Queries, keys and values are clamped to plus and minus this, after the norm."""

    @property
    def kv_elements(self) -> int:
        """Numbers in the KV cache for each token."""
        return 2 * self.kv_heads * self.head_dim


@dataclass(frozen=True, slots=True)
class Stacked:
    """Where a checkpoint that stacks its experts has a tensor: expert e begins at element `offset` + e * `stride`."""

    tensor: str
    shape: tuple[int, ...]
    offset: int = 0
    stride: int = 0


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor of the checkpoint. In a part of an expert its name has "{expert}" for the number."""

    tensor: str
    shape: tuple[int, ...]
    stacked: Stacked | None = None
    repeat: int = 1
    """It stands so many times in the parameter, one below the other."""


@dataclass(frozen=True, slots=True)
class Parameter:
    """A tensor in a rank's memory, made of pieces: of a vector one behind the other, of a matrix side by side."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    turned: bool = True
    """A matrix lies [in, out], and its pieces in the checkpoint [out, in]."""

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    def of_expert(self, expert: int) -> Parameter:
        """Of a part of all experts: that of one."""
        pieces = tuple(_of_expert(piece, expert) for piece in self.pieces)
        return replace(self, pieces=pieces)


def _of_expert(piece: Piece, expert: int) -> Piece:
    at = piece.stacked
    moved = at and Stacked(at.tensor, at.shape, at.offset + expert * at.stride)
    return replace(piece, tensor=piece.tensor.format(expert=expert), stacked=moved)


@dataclass(frozen=True, slots=True)
class Moe:
    """A softmax gate picks `top_k` of `experts`; each is a SwiGLU of width `inner`."""

    experts: int
    top_k: int
    inner: int
    renormalise: bool
    """The chosen experts' weights are scaled to sum to one."""
    parts: tuple[Parameter, ...]
    """Of one expert, in the order in which checksums run over their bytes."""


@dataclass(frozen=True, slots=True)
class Layer:
    attention: Attention
    ffn: Moe
    dense: tuple[Parameter, ...]
    """What every rank has of it."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """All layers mix experts, as many in each."""

    family: str
    vocab_size: int
    hidden_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    eos_token_ids: tuple[int, ...]
    dense: tuple[Parameter, ...]
    """What belongs to no layer: `embed` [V, H], `final_norm` [H], `lm_head` [H, V]."""
    layers: tuple[Layer, ...]

    @property
    def moe_layers(self) -> int:
        return len(self.layers)

    @property
    def attention(self) -> Attention:
        """The same in every layer."""
        return self.layers[0].attention

    @property
    def moe(self) -> Moe:
        return self.layers[0].ffn

    def kv_page_bytes(self, device: str, page_size: int) -> int:
        """Of a page of the KV cache, all layers."""
        return sum(layer.attention.kv_elements for layer in self.layers) * page_size * KV_ITEM[device]

    def exchange_shape(self, max_tokens: int, placement: Placement) -> ExchangeShape:
        """For ranks that compute `max_tokens` a step: dispatch and combine in every layer with experts."""
        return ExchangeShape(
            num_ranks=placement.num_ranks,
            max_tokens=max_tokens,
            hidden=self.hidden_size,
            top_k=self.moe.top_k,
            slots_per_rank=placement.slots_per_rank,
            operations_per_step=2 * self.moe_layers,
        )

    @property
    def dense_elements(self) -> int:
        layers = sum(part.elements for layer in self.layers for part in layer.dense)
        return sum(part.elements for part in self.dense) + layers

    @property
    def expert_elements(self) -> int:
        """Of one expert."""
        return sum(part.elements for part in self.moe.parts)

    def pieces(self) -> Iterator[Piece]:
        """All that the engine reads of a checkpoint."""
        for part in self.dense:
            yield from part.pieces
        for layer in self.layers:
            for part in layer.dense:
                yield from part.pieces
            for expert in range(layer.ffn.experts):
                for part in layer.ffn.parts:
                    yield from part.of_expert(expert).pieces
