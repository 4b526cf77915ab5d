"""What the families have in common: a decoder of pre-normed layers, attention and experts, and its parameters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from elastic_ep.models.config_json import ConfigFields
from elastic_ep.models.decoder_config import DecoderConfig
from elastic_ep.models.spec import (
    SOFTMAX_GATE,
    AnyAttention,
    Attention,
    Clamped,
    Dense,
    Gate,
    LatentAttention,
    Layer,
    ModelSpec,
    Moe,
    Norm,
    Parameter,
    Piece,
    QkNorm,
    Shared,
    Stacked,
    Temperature,
    Window,
)


@dataclass(frozen=True, slots=True)
class MoeNames:
    """Names of a layer's gate and of an expert's tensors in checkpoints, below `model.layers.N.`."""

    block: str
    gate_proj: str
    up_proj: str
    down_proj: str
    dense: str = "mlp"
    """The FFN of a layer without experts."""
    gate: str = "gate"
    """Below `block`, as are the next two."""
    correction: str = "gate.e_score_correction_bias"
    shared: str = "shared_experts"
    fused_gate: str = "mlp.gate"
    """In a checkpoint that stacks its experts, as is the next."""
    fused_correction: str = "mlp.gate.e_score_correction_bias"


@dataclass(frozen=True, slots=True)
class Extras:
    """What a family adds to the plain decoder; the defaults add nothing."""

    windows: tuple[Window | None, ...] = ()
    """Of each layer's attention."""
    unrotated: frozenset[int] = frozenset()
    """Layers without rotary embeddings; nothing is normed there, and `temperature` is theirs."""
    temperature: Temperature | None = None
    interleaved: bool = False
    sinks: bool = False
    scale: float | None = None
    latent: LatentAttention | None = None
    """Instead of grouped queries."""
    qkv_bias: bool = False
    out_bias: bool = False
    ffn_bias: bool = False
    """Of dense layers and shared experts."""
    gate: Gate = SOFTMAX_GATE
    shared: Shared | None = None
    activation: Clamped | None = None
    dense_layers: frozenset[int] = frozenset()
    """They have an FFN without experts, of width `dense_inner`."""
    dense_inner: int = 0
    norm: Norm = Norm.RMS
    head_bias: bool = False
    embed_factor: float = 1.0
    branch_factor: float = 1.0
    logits_divisor: float = 1.0
    correction_shape: tuple[int, ...] = ()
    """Of the tensor in the checkpoint, before the number of experts."""
    experts: Callable[[str, DecoderConfig], tuple[Parameter, ...]] | None = None
    """Parts of an expert, below a layer's prefix, where they do not lie as in most checkpoints."""


PLAIN = Extras()


def decoder(
    family: str,
    config: DecoderConfig,
    names: MoeNames,
    *,
    qk_norm: QkNorm = QkNorm.NONE,
    clip_qkv: float | None = None,
    extras: Extras = PLAIN,
) -> ModelSpec:
    def attention(index: int) -> AnyAttention:
        bare = index in extras.unrotated
        return extras.latent or Attention(
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            rope_theta=config.rope_theta,
            qk_norm=QkNorm.NONE if bare else qk_norm,
            clip_qkv=clip_qkv,
            rotary_dim=0 if bare else config.rotary_dim,
            interleaved=extras.interleaved,
            scaling=config.scaling,
            window=extras.windows[index] if extras.windows else None,
            temperature=extras.temperature if bare else None,
            sinks=extras.sinks,
            scale=extras.scale,
        )

    return ModelSpec(
        family=family,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        eos_token_ids=config.eos_token_ids,
        dense=_outside(config, extras),
        layers=tuple(
            _layer(config, attention(index), names, index, extras)
            for index in range(config.num_hidden_layers)
        ),
        norm=extras.norm,
        embed_factor=extras.embed_factor,
        branch_factor=extras.branch_factor,
        logits_divisor=extras.logits_divisor,
    )


def _outside(config: DecoderConfig, extras: Extras) -> tuple[Parameter, ...]:
    vocab, hidden = config.vocab_size, config.hidden_size
    embed = "model.embed_tokens.weight"
    head = embed if config.tie_word_embeddings else "lm_head.weight"
    return (
        Parameter("embed", (vocab, hidden), (Piece(embed, (vocab, hidden)),), turned=False),
        *_norm("final_norm", "model.norm", hidden, extras.norm),
        Parameter("lm_head", (hidden, vocab), (Piece(head, (vocab, hidden)),)),
        *((vector("lm_head_bias", "lm_head.bias", vocab),) if extras.head_bias else ()),
    )


def _layer(config: DecoderConfig, kind: AnyAttention, names: MoeNames, index: int, extras: Extras) -> Layer:
    prefix, hidden = f"model.layers.{index}.", config.hidden_size
    own = prefix + "self_attn."
    dense = (
        *_norm("input_norm", prefix + "input_layernorm", hidden, extras.norm),
        *(
            _latents(own, hidden, kind, extras)
            if isinstance(kind, LatentAttention)
            else _attention(own, hidden, kind, extras)
        ),
        *_norm("post_norm", prefix + "post_attention_layernorm", hidden, extras.norm),
    )
    if index in extras.dense_layers:
        ffn = _feed_forward("", f"{prefix}{names.dense}.", hidden, extras.dense_inner, extras.ffn_bias)
        return Layer(kind, Dense(extras.dense_inner), (*dense, *ffn))
    block = f"{prefix}{names.block}."
    experts = (
        extras.experts(prefix, config)
        if extras.experts
        else _swiglu(prefix, f"{block}experts.{{expert}}.", names, config)
    )
    moe = Moe(
        experts=config.num_experts,
        top_k=config.num_experts_per_tok,
        inner=config.moe_intermediate_size,
        renormalise=config.norm_topk_prob,
        parts=experts,
        gate=extras.gate,
        shared=extras.shared,
        activation=extras.activation,
    )
    dense = (*dense, *_gate(prefix, names, config, extras), *_shared(block, names, hidden, extras))
    return Layer(kind, moe, dense)


def _attention(prefix: str, hidden: int, kind: Attention, extras: Extras) -> tuple[Parameter, ...]:
    """`qkv` [H, (Hq + 2 Hk) D]: queries, keys, values. `out` [Hq D, H]. `qk_norm` [Hq + Hk, D]: one row a head."""
    queries, keys = kind.heads * kind.head_dim, kind.kv_heads * kind.head_dim
    widths = {"q": queries, "k": keys, "v": keys}
    pieces = tuple(Piece(f"{prefix}{name}_proj.weight", (width, hidden)) for name, width in widths.items())
    made = [Parameter("qkv", (hidden, queries + 2 * keys), pieces)]
    if extras.qkv_bias:
        biases = tuple(Piece(f"{prefix}{name}_proj.bias", (width,)) for name, width in widths.items())
        made.append(Parameter("qkv_bias", (queries + 2 * keys,), biases))
    made += _qk_norm(prefix, kind)
    if kind.sinks:
        made.append(vector("sinks", prefix + "sinks", kind.heads))
    return *made, *_out(prefix, queries, hidden, extras)


def _qk_norm(prefix: str, kind: Attention) -> tuple[Parameter, ...]:
    q_norm, k_norm = prefix + "q_norm.weight", prefix + "k_norm.weight"
    shape = (kind.heads + kind.kv_heads, kind.head_dim)
    match kind.qk_norm:
        case QkNorm.NONE | QkNorm.UNWEIGHTED:
            return ()
        case QkNorm.HEAD:
            norms = (
                Piece(q_norm, (kind.head_dim,), repeat=kind.heads),
                Piece(k_norm, (kind.head_dim,), repeat=kind.kv_heads),
            )
        case QkNorm.PROJECTION:
            widths = kind.heads * kind.head_dim, kind.kv_heads * kind.head_dim
            norms = Piece(q_norm, (widths[0],)), Piece(k_norm, (widths[1],))
    return (Parameter("qk_norm", shape, norms),)


def _latents(prefix: str, hidden: int, kind: LatentAttention, extras: Extras) -> tuple[Parameter, ...]:
    """As `LatentAttention` says."""
    queries, keys = kind.heads * (kind.nope + kind.rope), kind.kv_rank + kind.rope
    first = queries if kind.q_rank is None else kind.q_rank
    q = prefix + ("q_proj" if kind.q_rank is None else "q_a_proj")
    kv = prefix + "kv_a_proj_with_mqa"
    pieces = Piece(f"{q}.weight", (first, hidden)), Piece(f"{kv}.weight", (keys, hidden))
    made = [Parameter("latents", (hidden, first + keys), pieces)]
    if extras.qkv_bias:
        biases = Piece(f"{q}.bias", (first,)), Piece(f"{kv}.bias", (keys,))
        made.append(Parameter("latents_bias", (first + keys,), biases))
    if kind.q_rank is not None:
        made.append(vector("q_norm", prefix + "q_a_layernorm.weight", kind.q_rank))
        made.append(matrix("q_b", prefix + "q_b_proj.weight", kind.q_rank, queries))
    made.append(vector("kv_norm", prefix + "kv_a_layernorm.weight", kind.kv_rank))
    shape = kind.heads * (kind.nope + kind.value), kind.kv_rank
    made.append(Parameter("kv_b", shape, (Piece(prefix + "kv_b_proj.weight", shape),), turned=False))
    return *made, *_out(prefix, kind.heads * kind.value, hidden, extras)


def _out(prefix: str, width: int, hidden: int, extras: Extras) -> tuple[Parameter, ...]:
    out = matrix("out", prefix + "o_proj.weight", width, hidden)
    return (out, vector("out_bias", prefix + "o_proj.bias", hidden)) if extras.out_bias else (out,)


def _gate(prefix: str, names: MoeNames, config: DecoderConfig, extras: Extras) -> tuple[Parameter, ...]:
    """[H, E]"""
    experts, block = config.num_experts, f"{prefix}{names.block}."
    shape = experts, config.hidden_size
    gate = block + names.gate
    stacked = Stacked(f"{prefix}{names.fused_gate}.weight", shape)
    made = [Parameter("gate", shape[::-1], (Piece(f"{gate}.weight", shape, stacked),))]
    if extras.gate.bias:
        made.append(vector("gate_bias", f"{gate}.bias", experts))
    if extras.gate.correction:
        lies = (*extras.correction_shape, experts)
        piece = Piece(block + names.correction, lies, Stacked(prefix + names.fused_correction, lies))
        made.append(Parameter("gate_correction", (experts,), (piece,), exact=True))
    return tuple(made)


def _shared(block: str, names: MoeNames, hidden: int, extras: Extras) -> tuple[Parameter, ...]:
    if extras.shared is None:
        return ()
    made = _feed_forward("shared_", f"{block}{names.shared}.", hidden, extras.shared.inner, extras.ffn_bias)
    if extras.shared.gated:
        made = (*made, matrix("shared_gate", f"{block}{names.shared}_gate.weight", hidden, 1))
    return made


def _feed_forward(name: str, prefix: str, hidden: int, inner: int, bias: bool) -> tuple[Parameter, ...]:
    both = tuple(Piece(f"{prefix}{side}_proj.weight", (inner, hidden)) for side in ("gate", "up"))
    made = (
        Parameter(f"{name}gate_up", (hidden, 2 * inner), both),
        matrix(f"{name}down", prefix + "down_proj.weight", inner, hidden),
    )
    if not bias:
        return made
    biases = tuple(Piece(f"{prefix}{side}_proj.bias", (inner,)) for side in ("gate", "up"))
    return (
        *made,
        Parameter(f"{name}gate_up_bias", (2 * inner,), biases),
        vector(f"{name}down_bias", prefix + "down_proj.bias", hidden),
    )


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


def _norm(name: str, tensor: str, width: int, norm: Norm) -> tuple[Parameter, ...]:
    weight = vector(name, f"{tensor}.weight", width)
    return (weight, vector(f"{name}_bias", f"{tensor}.bias", width)) if norm is Norm.LAYER else (weight,)


def vector(name: str, tensor: str, width: int) -> Parameter:
    return Parameter(name, (width,), (Piece(tensor, (width,)),))


def matrix(name: str, tensor: str, rows: int, columns: int) -> Parameter:
    return Parameter(name, (rows, columns), (Piece(tensor, (columns, rows)),))


Reader = Callable[[ConfigFields], ModelSpec]
"""A family: from its configuration to its spec. Raises `CheckpointError` for what it does not do."""
