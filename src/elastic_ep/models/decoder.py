"""What the families have in common: a decoder of pre-normed layers, attention and experts, and its parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from elastic_ep.models.config_json import ConfigFields, eos_token_ids, rope_theta
from elastic_ep.models.spec import Attention, Layer, ModelSpec, Moe, Parameter, Piece, QkNorm, Stacked

_MOST_LAYERS, _MOST_EXPERTS = 1024, 4096
"""What is planned for each of them takes time and memory before anybody asks whether they fit a machine."""


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Sizes of such a model, named as in Hugging Face's configurations.

    `num_key_value_heads` divides `num_attention_heads`; `head_dim` is even. `norm_topk_prob`: the chosen experts' weights
    are scaled to sum to one. `eos_token_ids` end a sequence.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    num_experts: int
    num_experts_per_tok: int
    moe_intermediate_size: int
    max_position_embeddings: int
    norm_topk_prob: bool
    tie_word_embeddings: bool
    rms_norm_eps: float
    rope_theta: float
    eos_token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class MoeNames:
    """Names of a layer's gate and of an expert's tensors in checkpoints, below `model.layers.N.`."""

    block: str
    gate_proj: str
    up_proj: str
    down_proj: str


def read_config(
    fields: ConfigFields,
    *,
    inner: str,
    norm_topk_prob: bool | None = None,
    default_eps: float,
    default_theta: float,
) -> DecoderConfig:
    """`inner` names an expert's width; `norm_topk_prob` None: as the configuration says. Raises `CheckpointError`."""
    heads, hidden = fields.positive("num_attention_heads"), fields.positive("hidden_size")
    vocab_size = fields.positive("vocab_size")
    config = DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_hidden_layers=fields.positive("num_hidden_layers", most=_MOST_LAYERS),
        num_attention_heads=heads,
        num_key_value_heads=fields.positive("num_key_value_heads", heads),
        head_dim=fields.positive("head_dim", max(hidden // heads, 1)),
        num_experts=fields.positive(
            "num_local_experts" if fields.has("num_local_experts") else "num_experts", most=_MOST_EXPERTS
        ),
        num_experts_per_tok=fields.positive("num_experts_per_tok"),
        moe_intermediate_size=fields.positive(inner),
        max_position_embeddings=fields.positive("max_position_embeddings"),
        norm_topk_prob=fields.boolean("norm_topk_prob", False) if norm_topk_prob is None else norm_topk_prob,
        tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
        rms_norm_eps=fields.number("rms_norm_eps", default_eps, high=1.0),
        rope_theta=rope_theta(fields, default_theta),
        eos_token_ids=eos_token_ids(fields, vocab_size),
    )
    if heads % config.num_key_value_heads:
        raise fields.error("num_key_value_heads", "does not divide num_attention_heads")
    if config.head_dim % 2:
        raise fields.error("head_dim", "is odd; rotary embeddings need an even one")
    if config.num_experts_per_tok > config.num_experts:
        raise fields.error("num_experts_per_tok", "is more than there are experts")
    return config


def decoder(
    family: str,
    config: DecoderConfig,
    names: MoeNames,
    *,
    qk_norm: QkNorm = QkNorm.NONE,
    clip_qkv: float | None = None,
) -> ModelSpec:
    attention = Attention(
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        rope_theta=config.rope_theta,
        qk_norm=qk_norm,
        clip_qkv=clip_qkv,
    )
    return ModelSpec(
        family=family,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        eos_token_ids=config.eos_token_ids,
        dense=_outside(config),
        layers=tuple(_layer(config, attention, names, index) for index in range(config.num_hidden_layers)),
    )


def _outside(config: DecoderConfig) -> tuple[Parameter, ...]:
    vocab, hidden = config.vocab_size, config.hidden_size
    embed = "model.embed_tokens.weight"
    head = embed if config.tie_word_embeddings else "lm_head.weight"
    return (
        Parameter("embed", (vocab, hidden), (Piece(embed, (vocab, hidden)),), turned=False),
        _vector("final_norm", "model.norm.weight", hidden),
        Parameter("lm_head", (hidden, vocab), (Piece(head, (vocab, hidden)),)),
    )


def _layer(config: DecoderConfig, attention: Attention, names: MoeNames, index: int) -> Layer:
    prefix, hidden = f"model.layers.{index}.", config.hidden_size
    block = prefix + names.block
    dense = (
        _vector("input_norm", prefix + "input_layernorm.weight", hidden),
        *_attention(prefix + "self_attn.", hidden, attention),
        _vector("post_norm", prefix + "post_attention_layernorm.weight", hidden),
        _gate(prefix, names, config),
    )
    ffn = Moe(
        experts=config.num_experts,
        top_k=config.num_experts_per_tok,
        inner=config.moe_intermediate_size,
        renormalise=config.norm_topk_prob,
        parts=_swiglu(prefix, f"{block}.experts.{{expert}}.", names, config),
    )
    return Layer(attention, ffn, dense)


def _attention(prefix: str, hidden: int, kind: Attention) -> tuple[Parameter, ...]:
    """`qkv` [H, (Hq + 2 Hk) D]: queries, keys, values. `out` [Hq D, H]. `qk_norm` [Hq + Hk, D]: one row a head."""
    queries, keys = kind.heads * kind.head_dim, kind.kv_heads * kind.head_dim
    widths = {"q": queries, "k": keys, "v": keys}
    pieces = tuple(Piece(f"{prefix}{name}_proj.weight", (width, hidden)) for name, width in widths.items())
    qkv = Parameter("qkv", (hidden, queries + 2 * keys), pieces)
    out = _matrix("out", prefix + "o_proj.weight", queries, hidden)
    q_norm, k_norm = prefix + "q_norm.weight", prefix + "k_norm.weight"
    shape = (kind.heads + kind.kv_heads, kind.head_dim)
    match kind.qk_norm:
        case QkNorm.NONE:
            return qkv, out
        case QkNorm.HEAD:
            norms = (
                Piece(q_norm, (kind.head_dim,), repeat=kind.heads),
                Piece(k_norm, (kind.head_dim,), repeat=kind.kv_heads),
            )
        case QkNorm.PROJECTION:
            norms = Piece(q_norm, (queries,)), Piece(k_norm, (keys,))
    return qkv, Parameter("qk_norm", shape, norms), out


def _gate(prefix: str, names: MoeNames, config: DecoderConfig) -> Parameter:
    """[H, E]"""
    shape = config.num_experts, config.hidden_size
    stacked = Stacked(prefix + "mlp.gate.weight", shape)
    piece = Piece(f"{prefix}{names.block}.gate.weight", shape, stacked)
    return Parameter("gate", shape[::-1], (piece,))


def _swiglu(prefix: str, expert: str, names: MoeNames, config: DecoderConfig) -> tuple[Parameter, ...]:
    """`gate_up` [H, 2 I] and `down` [I, H]. Checkpoints that stack experts have [E, 2 I, H] and [E, H, I]."""
    hidden, inner, experts = config.hidden_size, config.moe_intermediate_size, config.num_experts
    both, one = (experts, 2 * inner, hidden), (experts, hidden, inner)
    stacked_both, stacked_one = prefix + "mlp.experts.gate_up_proj", prefix + "mlp.experts.down_proj"
    stride, half = 2 * inner * hidden, inner * hidden

    def piece(name: str, shape: tuple[int, int], stacked: Stacked) -> Piece:
        return Piece(f"{expert}{name}.weight", shape, stacked)

    gate = piece(names.gate_proj, (inner, hidden), Stacked(stacked_both, both, 0, stride))
    up = piece(names.up_proj, (inner, hidden), Stacked(stacked_both, both, half, stride))
    down = piece(names.down_proj, (hidden, inner), Stacked(stacked_one, one, 0, half))
    return Parameter("gate_up", (hidden, 2 * inner), (gate, up)), Parameter("down", (inner, hidden), (down,))


def _vector(name: str, tensor: str, width: int) -> Parameter:
    return Parameter(name, (width,), (Piece(tensor, (width,)),))


def _matrix(name: str, tensor: str, rows: int, columns: int) -> Parameter:
    return Parameter(name, (rows, columns), (Piece(tensor, (columns, rows)),))


Reader = Callable[[ConfigFields], ModelSpec]
"""A family: from its configuration to its spec. Raises `CheckpointError` for what it does not do."""
