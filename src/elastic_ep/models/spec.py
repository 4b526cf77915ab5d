"""What a model family says of itself: kinds of attention and FFN by layer, parameters, and where a checkpoint has them.

Plain data, standard library only: the run process plans with it, and the engine runs any spec over its operations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass, replace
from enum import Enum
from typing import TypeVar, cast

from elastic_ep.exchange.base import ExchangeShape
from elastic_ep.models.formats import PLAIN, ROW_GROUP, Format, Fp8, Need
from elastic_ep.models.formats import Stacked as Stacked
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
    UNWEIGHTED = "unweighted"
    """Each head by itself, and no parameter."""


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """All frequencies are divided by `factor`."""

    factor: float


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Waves longer than `original` / `low` positions are stretched, those shorter than `original` / `high` are not."""

    factor: float
    low: float
    high: float
    original: int
    """Positions that the model was first trained with."""


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """Frequencies that turn fewer than `slow` times in `original` positions are stretched, from `fast` times on none."""

    factor: float
    fast: float
    slow: float
    original: int
    truncate: bool
    """The ramp between them begins and ends at whole frequencies."""
    attention: float
    """Of cosines and sines."""


@dataclass(frozen=True, slots=True)
class LongScaling:
    """LongRoPE: a divisor for each frequency, and what cosines and sines are multiplied by.

    The long ones are for engines that serve more than `original` positions, and then for all of these: a token's
    numbers do not depend on how long its text becomes.
    """

    original: int
    short: tuple[float, ...]
    long: tuple[float, ...]
    short_attention: float
    long_attention: float


Scaling = LinearScaling | Llama3Scaling | YarnScaling | LongScaling


@dataclass(frozen=True, slots=True)
class Rotary:
    """Rotary embeddings of the first `dim` numbers of a head, pairs (i, i + dim/2), or `interleaved` (2i, 2i + 1)."""

    dim: int
    theta: float
    interleaved: bool = False
    scaling: Scaling | None = None


@dataclass(frozen=True, slots=True)
class Window:
    """A token sees itself and at most `size` - 1 before it: the last ones, or those of its own chunk."""

    size: int
    chunked: bool = False
    """Positions are cut into chunks of `size`, of which none sees another."""


@dataclass(frozen=True, slots=True)
class Temperature:
    """Queries at position p are multiplied by 1 + `scale` ln(1 + floor((p + 1) / `floor`))."""

    floor: float
    scale: float


@dataclass(frozen=True, slots=True)
class Attention:
    """Grouped-query attention with rotary embeddings."""

    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float
    qk_norm: QkNorm
    clip_qkv: float | None = None
    """Queries, keys and values are clamped to plus and minus this, after the norm."""
    rotary_dim: int | None = None
    """None: all of a head is rotated; 0: nothing of it."""
    interleaved: bool = False
    scaling: Scaling | None = None
    window: Window | None = None
    """None: a token sees all that are before it."""
    temperature: Temperature | None = None
    sinks: bool = False
    """A score for each query head that takes probability from all keys: parameter `sinks` [Hq]."""
    scale: float | None = None
    """Of scores; None: 1 / sqrt(head_dim)."""

    @property
    def kv_elements(self) -> int:
        """Numbers in the KV cache for each token."""
        return 2 * self.kv_heads * self.head_dim

    @property
    def rotary(self) -> Rotary:
        dim = self.head_dim if self.rotary_dim is None else self.rotary_dim
        return Rotary(dim, self.rope_theta, self.interleaved, self.scaling)

    @property
    def score_scale(self) -> float:
        return self.head_dim**-0.5 if self.scale is None else self.scale


@dataclass(frozen=True, slots=True)
class LatentAttention:
    """MLA (DeepSeek): keys and values of all heads are products of one latent a token, which is what the cache holds.

    A head's key is [`nope`] of the latent and [`rope`] that all heads share and that alone is rotated. Parameters:
    `latents` [H, (q_rank or Hq (nope + rope)) + kv_rank + rope], with `q_rank` `q_norm` and `q_b`
    [q_rank, Hq (nope + rope)], `kv_norm`, and `kv_b` [Hq (nope + value), kv_rank], which is not turned.
    """

    heads: int
    q_rank: int | None
    kv_rank: int
    nope: int
    rope: int
    value: int
    rotary: Rotary
    score_scale: float
    norm_eps: float
    """Of the latents' norms."""
    window: Window | None = None

    @property
    def kv_elements(self) -> int:
        return self.kv_rank + self.rope


AnyAttention = Attention | LatentAttention


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor of the checkpoint. In a part of an expert its name has "{expert}" for the number."""

    tensor: str
    shape: tuple[int, ...]
    stacked: Stacked | None = None
    repeat: int = 1
    """It stands so many times in the parameter, one below the other."""
    alternating: bool = False
    """Its columns in the parameter alternate in the checkpoint, gate and up: here those of the gate come first."""
    format: Format = PLAIN

    @property
    def needs(self) -> tuple[Need, ...]:
        return self.format.needs(self.tensor, self.shape, self.stacked)


@dataclass(frozen=True, slots=True)
class Parameter:
    """A tensor in a rank's memory, made of pieces: of a vector one behind the other, of a matrix side by side."""

    name: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]
    turned: bool = True
    """A matrix lies [in, out], and its pieces in the checkpoint [out, in]."""
    exact: bool = False
    """It is float32 whatever the weights are."""

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def quantised(self) -> bool:
        """Its pieces are codes and scales, all in one format."""
        return self.pieces[0].format.quantised

    @property
    def kept(self) -> tuple[Kept, ...]:
        """What it is kept as, where codes stay codes."""
        if not self.quantised:
            return (Kept(self.name, self.shape),)
        roles = zip(*(piece.needs for piece in self.pieces), strict=True)
        return tuple(_kept(self.name, needs) for needs in roles)

    @property
    def coded_dense(self) -> bool:
        """On a GPU it stays codes, as a layer's but no expert's: FP8 that rows become too."""
        plain = self.turned and not self.exact
        return plain and all(
            isinstance(piece.format, Fp8)
            and piece.format.rows_too
            and len(piece.shape) == 2
            and piece.repeat == 1
            and not piece.alternating
            for piece in self.pieces
        )

    def dense_nbytes(self, item: int) -> int:
        """As a rank on a GPU has it, with weights of `item` bytes where it is not codes."""
        if not self.coded_dense:
            return self.elements * item
        inner, out = self.shape
        return out * (inner + 4 * -(-inner // ROW_GROUP))

    def of_expert(self, expert: int) -> Parameter:
        """Of a part of all experts: that of one."""
        pieces = tuple(_of_expert(piece, expert) for piece in self.pieces)
        return replace(self, pieces=pieces)


@dataclass(frozen=True, slots=True)
class Kept:
    """Bytes of an expert that a rank has: a parameter, or codes or scales of its pieces, one below the other."""

    name: str
    shape: tuple[int, ...]
    dtype: str | None = None
    """None: as the rank's weights are."""
    rows: tuple[int, ...] = ()
    """How many are of each piece, of codes and scales."""

    def nbytes(self, item: int) -> int:
        """With weights of `item` bytes."""
        return math.prod(self.shape) * (ITEM_BYTES[self.dtype] if self.dtype else item)


ITEM_BYTES = {"BF16": 2, "F16": 2, "F32": 4, "F8_E4M3": 1, "F8_E8M0": 1, "U8": 1, "I32": 4}
"""Of a number, by the names that safetensors has for them."""


def _kept(name: str, needs: tuple[Need, ...]) -> Kept:
    rows = tuple(need.shape[0] for need in needs)
    return Kept(f"{name}.{needs[0].role}", (sum(rows), *needs[0].shape[1:]), needs[0].held, rows)


def _of_expert(piece: Piece, expert: int) -> Piece:
    at = piece.stacked
    moved = at and replace(at, offset=at.offset + expert * at.stride)
    return replace(piece, tensor=piece.tensor.format(expert=expert), stacked=moved)


@dataclass(frozen=True, slots=True)
class Clamped:
    """gpt-oss's activation: (up + 1) * gate * sigmoid(`alpha` * gate), clamped at `limit` (up on both sides)."""

    alpha: float
    limit: float


class Scores(Enum):
    """What becomes of a gate's logits."""

    SOFTMAX = "softmax"
    SIGMOID = "sigmoid"
    SOFTMAX_OF_CHOSEN = "softmax of the chosen"
    """The highest logits are chosen, and the softmax is theirs alone."""
    SIGMOID_OF_CHOSEN = "sigmoid of the chosen"
    """The highest logits are chosen, also where sigmoids are all one."""
    SPARSE_MIXER = "sparse mixer"
    """PhiMoE: two are chosen, each with its share among the logits that come within twice `jitter` of it."""


class GroupScores(Enum):
    """By what a group of experts is chosen, and what its neighbours' scores are then."""

    HIGHEST = "highest"
    """DeepSeek-V2: its best expert; 0 outside."""
    TWO_HIGHEST = "two highest"
    """DeepSeek-V3: the sum of its two best; minus infinity outside."""


@dataclass(frozen=True, slots=True)
class Gate:
    """How experts are chosen and weighed. Parameters: `gate` [H, E], and what is said here."""

    scores: Scores = Scores.SOFTMAX
    bias: bool = False
    """`gate_bias` [E] is added to the logits."""
    correction: bool = False
    """`gate_correction` [E] is added to the scores for the choice alone."""
    groups: int = 1
    top_groups: int = 1
    """Of the `groups` of neighbouring experts only so many are chosen from."""
    group_scores: GroupScores = GroupScores.TWO_HIGHEST
    least_sum: float = 0.0
    """Renormalised weights are divided by this at least."""
    added_to_sum: float = 0.0
    """Renormalised weights are divided by their sum plus this."""
    factor: float = 1.0
    """Of the weights, in the end."""
    jitter: float = 0.0
    into: bool = False
    """The weight is of what goes into the expert, not of what comes out. One is chosen then: a row is sent once."""


SOFTMAX_GATE = Gate()


@dataclass(frozen=True, slots=True)
class Shared:
    """An FFN that every token passes beside its experts. Parameters as of `Dense`, with `shared_` before their names."""

    inner: int
    gated: bool = False
    """It is multiplied by sigmoid(x @ `shared_gate` [H, 1])."""


@dataclass(frozen=True, slots=True)
class Dense:
    """An FFN without experts. Parameters `gate_up` [H, 2 I] and `down` [I, H]."""

    inner: int


@dataclass(frozen=True, slots=True)
class Moe:
    """A gate picks `top_k` of `experts`; each is a gated FFN of width `inner`."""

    experts: int
    top_k: int
    inner: int
    renormalise: bool
    """The chosen experts' weights are scaled to sum to one."""
    parts: tuple[Parameter, ...]
    """Of one expert, in the order in which checksums run over their bytes."""
    gate: Gate = SOFTMAX_GATE
    shared: Shared | None = None
    activation: Clamped | None = None
    """None: silu(gate) * up."""

    @property
    def kept(self) -> tuple[Kept, ...]:
        """What the parts are kept as, in that order."""
        return tuple(kept for part in self.parts for kept in part.kept)


@dataclass(frozen=True, slots=True)
class Layer:
    attention: AnyAttention
    ffn: Moe | Dense
    dense: tuple[Parameter, ...]
    """What every rank has of it. A bias is named after its matrix: `qkv_bias`, `out_bias`, `gate_up_bias`."""


class Norm(Enum):
    RMS = "rms"
    LAYER = "layer"
    """With a bias, named after the weight: `input_norm_bias`, `post_norm_bias`, `final_norm_bias`."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """Layers that mix experts are alike in sizes; of attention layers may differ in all but heads and their size.

    Slots, loads and exchange operations are those of `mixtures`: a number that says which counts these alone.
    """

    family: str
    vocab_size: int
    hidden_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    eos_token_ids: tuple[int, ...]
    dense: tuple[Parameter, ...]
    """What belongs to no layer: `embed` [V, H], `final_norm` [H], `lm_head` [H, V], and what else the family has."""
    layers: tuple[Layer, ...]
    norm: Norm = Norm.RMS
    embed_factor: float = 1.0
    """Of embeddings."""
    branch_factor: float = 1.0
    """Of what attention and FFN add to the residual."""
    logits_divisor: float = 1.0
    quantisation: str = ""
    """As --quantization names it; some pieces have a format then."""

    @property
    def mixtures(self) -> tuple[int, ...]:
        """The layers that mix experts."""
        return tuple(index for index, layer in enumerate(self.layers) if isinstance(layer.ffn, Moe))

    @property
    def moe_layers(self) -> int:
        return len(self.mixtures)

    @property
    def attention(self) -> AnyAttention:
        """That of the first layer: the others have as many heads, of the same sizes."""
        return self.layers[0].attention

    @property
    def grouped(self) -> Attention:
        """The same, of a model that has no other kind."""
        kind = self.attention
        assert isinstance(kind, Attention), "who needs this refuses other kinds (models/known.py)"
        return kind

    @property
    def moe(self) -> Moe:
        """The first: the others have as many experts, of the same sizes."""
        return self.moe_of(0)

    def moe_of(self, mixture: int) -> Moe:
        ffn = self.layers[self.mixtures[mixture]].ffn
        assert isinstance(ffn, Moe)
        return ffn

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

    def dense_nbytes(self, item: int) -> int:
        """The same in bytes on a GPU: `Parameter.dense_nbytes`."""
        layers = sum(part.dense_nbytes(item) for layer in self.layers for part in layer.dense)
        return sum(part.elements for part in self.dense) * item + layers

    @property
    def expert_elements(self) -> int:
        """Of one expert."""
        return sum(part.elements for part in self.moe.parts)

    def expert_bytes(self, item: int) -> int:
        """Of one expert, kept as it lies in the checkpoint; with weights of `item` bytes where it is not quantised."""
        return sum(kept.nbytes(item) for kept in self.moe.kept)

    def pieces(self) -> Iterator[Piece]:
        """All that the engine reads of a checkpoint."""
        for part in self.dense:
            yield from part.pieces
        for layer in self.layers:
            for part in layer.dense:
                yield from part.pieces
            if isinstance(layer.ffn, Moe):
                for expert in range(layer.ffn.experts):
                    for part in layer.ffn.parts:
                        yield from part.of_expert(expert).pieces


_T = TypeVar("_T")


def with_parameters(value: _T, change: Callable[[Parameter], Parameter]) -> _T:
    """A frozen tree of dataclasses and tuples, with each parameter in it as `change` has it."""
    if isinstance(value, Parameter):
        return cast(_T, change(value))
    if isinstance(value, tuple):
        return cast(_T, tuple(with_parameters(one, change) for one in value))
    if is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: with_parameters(getattr(value, field.name), change) for field in fields(value)}
        return cast(_T, replace(value, **parts))
    return value
