"""What `config.json` says that is read alike in several families. Raises `CheckpointError`, naming the field."""

from __future__ import annotations

from dataclasses import dataclass, replace

from elastic_ep.models.config_json import ConfigFields, as_integer, eos_token_ids, shown
from elastic_ep.models.rope import read_rope
from elastic_ep.models.spec import Gate, Scaling, Window

MOST_LAYERS, MOST_EXPERTS = 1024, 4096
"""What is planned for each of them takes time and memory before anybody asks whether they fit a machine."""


@dataclass(frozen=True, slots=True)
class DecoderConfig:
    """Sizes of such a model, named as in Hugging Face's configurations.

    `num_key_value_heads` divides `num_attention_heads`; `head_dim` is even. `norm_topk_prob`: the chosen experts' weights
    are scaled to sum to one. `eos_token_ids` end a sequence. `rotary_dim` of a head's numbers are rotated, None: all.
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
    rotary_dim: int | None = None
    scaling: Scaling | None = None


def read_config(
    fields: ConfigFields,
    *,
    inner: str,
    norm_topk_prob: bool | None = None,
    norm_by_default: bool = False,
    default_eps: float,
    default_theta: float,
    experts: tuple[str, ...] = ("num_local_experts", "num_experts"),
    top_k: str = "num_experts_per_tok",
    default_top_k: int | None = None,
    default_head_dim: int | None = None,
    head_dim: int | None = None,
    rotary_share: float | None = None,
    tied_by_default: bool = False,
) -> DecoderConfig:
    """`inner` names an expert's width; `norm_topk_prob` None: as the configuration says. `experts` name their number, in
    order of preference; `head_dim`, if given, counts whatever the configuration says of it; `rotary_share`: see
    `read_rope`. Raises `CheckpointError`.
    """
    heads, hidden = fields.positive("num_attention_heads"), fields.positive("hidden_size")
    vocab_size = fields.positive("vocab_size")
    if head_dim is None:
        head_dim = fields.positive("head_dim", default_head_dim or max(hidden // heads, 1))
    if head_dim % 2:
        raise fields.error("head_dim", "is odd; rotary embeddings need an even one")
    rope = read_rope(fields, default_theta, head_dim, rotary_share)
    counted = next((name for name in experts if fields.has(name)), experts[-1])
    config = DecoderConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        num_hidden_layers=fields.positive("num_hidden_layers", most=MOST_LAYERS),
        num_attention_heads=heads,
        num_key_value_heads=fields.positive("num_key_value_heads", heads),
        head_dim=head_dim,
        num_experts=fields.positive(counted, most=MOST_EXPERTS),
        num_experts_per_tok=fields.positive(top_k, default_top_k),
        moe_intermediate_size=fields.positive(inner),
        # One token of a prompt, and one to generate.
        max_position_embeddings=fields.positive("max_position_embeddings", least=2),
        norm_topk_prob=fields.boolean("norm_topk_prob", norm_by_default)
        if norm_topk_prob is None
        else norm_topk_prob,
        tie_word_embeddings=fields.boolean("tie_word_embeddings", tied_by_default),
        rms_norm_eps=fields.number("rms_norm_eps", default_eps, high=1.0),
        rope_theta=rope.theta,
        eos_token_ids=eos_token_ids(fields, vocab_size),
        rotary_dim=None if rope.dim == head_dim else rope.dim,
        scaling=rope.scaling,
    )
    if heads % config.num_key_value_heads:
        raise fields.error("num_key_value_heads", "does not divide num_attention_heads")
    if config.num_experts_per_tok > config.num_experts:
        raise fields.error(top_k, "is more than there are experts")
    return config


def full_attention(fields: ConfigFields) -> None:
    """Refuse layers of any other kind. Raises `CheckpointError`."""
    layers = fields.get("layer_types")
    if layers is not None and (
        not isinstance(layers, list) or any(one != "full_attention" for one in layers)
    ):
        raise fields.error("layer_types", "asks for others than 'full_attention', which alone is supported")


def first_dense(fields: ConfigFields, default: int) -> frozenset[int]:
    """The layers before `first_k_dense_replace`. Raises `CheckpointError`."""
    layers, name = fields.positive("num_hidden_layers", most=MOST_LAYERS), "first_k_dense_replace"
    count = as_integer(fields.get(name) if fields.has(name) else default)
    if type(count) is not int or not 0 <= count < layers:
        raise fields.error(name, f"must be an integer from 0 to {layers - 1}, not {shown(fields.get(name))}")
    return frozenset(range(count))


def sparse_layers(fields: ConfigFields) -> frozenset[int]:
    """Qwen's: the layers without experts. Raises `CheckpointError`."""
    layers, listed = fields.positive("num_hidden_layers", most=MOST_LAYERS), fields.get("mlp_only_layers")
    if listed is not None and (
        not isinstance(listed, list) or any(type(as_integer(one)) is not int for one in listed)
    ):
        raise fields.error("mlp_only_layers", f"must be a list of layers, not {shown(listed)}")
    step, only = fields.positive("decoder_sparse_step", 1), set(listed or ())
    dense = frozenset(index for index in range(layers) if index in only or (index + 1) % step)
    if len(dense) == layers:
        raise fields.error("decoder_sparse_step", "and mlp_only_layers leave no layer with experts")
    return dense


def dense_inner(fields: ConfigFields, dense: frozenset[int]) -> int:
    """Width of the layers without experts. Raises `CheckpointError`."""
    return fields.positive("intermediate_size") if dense else 0


def grouped_gate(fields: ConfigFields, gate: Gate, experts: int, top_k: int, default: int | None) -> Gate:
    """With `n_group` and `topk_group`, `default` if not given. Raises `CheckpointError`."""
    groups = fields.positive("n_group", default)
    kept = fields.positive("topk_group", groups if default is None else min(default, groups))
    if experts % groups or kept > groups:
        raise fields.error("n_group", "does not divide the experts, or is less than topk_group")
    size = experts // groups
    if groups > 1 and (size < 2 or kept * size < top_k):
        raise fields.error("topk_group", "leaves too few experts to choose from")
    return replace(gate, groups=groups, top_groups=kept)


def one_window(fields: ConfigFields, layers: int, *, wanted: bool = False) -> tuple[Window | None, ...]:
    """Of all layers: `sliding_window`, which must be there if it is `wanted`. Raises `CheckpointError`."""
    if not fields.has("sliding_window") and not wanted:
        return ()
    return (Window(fields.positive("sliding_window")),) * layers
