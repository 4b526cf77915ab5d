"""DeepSeek-V2 and V2-Lite: latent attention, shared experts, a softmax gate that may be limited to the best groups."""

from __future__ import annotations

from elastic_ep.models.config_json import ConfigFields
from elastic_ep.models.decoder import Extras, MoeNames, decoder
from elastic_ep.models.decoder_config import DecoderConfig, first_dense, grouped_gate, read_config
from elastic_ep.models.rope import read_rope
from elastic_ep.models.spec import Gate, GroupScores, LatentAttention, ModelSpec, Rotary, Shared

ARCHITECTURE, MODEL_TYPE = "DeepseekV2ForCausalLM", "deepseek_v2"
NAMES = MoeNames("mlp", "gate_proj", "up_proj", "down_proj")
LATENT_EPS = 1e-6
"""Of the latents' norms, whatever the configuration says of the others."""


def read(fields: ConfigFields) -> ModelSpec:
    fields.allow("norm_topk_prob", None, False)
    fields.allow("mlp_bias", None, False)
    fields.allow("topk_method", "group_limited_greedy", None, "greedy")
    config = latent_config(fields, norm_topk_prob=False)
    gate = Gate(group_scores=GroupScores.HIGHEST, factor=fields.number("routed_scaling_factor", 1.0))
    if fields.get("topk_method") == "group_limited_greedy":
        gate = grouped_gate(fields, gate, config.num_experts, config.num_experts_per_tok, None)
    dense = first_dense(fields, 0)
    return decoder(
        MODEL_TYPE, config, NAMES, extras=latent_extras(fields, config, gate, dense, interleaved=True)
    )


def latent_config(fields: ConfigFields, norm_topk_prob: bool | None) -> DecoderConfig:
    """A head's rotated part is what `head_dim` means here. Raises `CheckpointError`."""
    fields.allow("hidden_act", None, "silu")
    fields.allow("moe_layer_freq", None, 1)
    fields.allow("scoring_func", None, "softmax", "sigmoid")
    config = read_config(
        fields,
        inner="moe_intermediate_size",
        experts=("n_routed_experts", "num_local_experts", "num_experts"),
        norm_topk_prob=norm_topk_prob,
        norm_by_default=True,
        default_eps=1e-6,
        default_theta=10_000.0,
        head_dim=fields.positive("qk_rope_head_dim", 64, most=4096),
    )
    if config.num_key_value_heads != config.num_attention_heads:
        raise fields.error("num_key_value_heads", "must be num_attention_heads: all heads share one latent")
    return config


def latent_extras(
    fields: ConfigFields, config: DecoderConfig, gate: Gate, dense: frozenset[int], *, interleaved: bool
) -> Extras:
    nope, value = fields.positive("qk_nope_head_dim", 128), fields.positive("v_head_dim", 128)
    kv_rank = fields.positive("kv_lora_rank", 512)
    q_rank = fields.positive("q_lora_rank") if fields.has("q_lora_rank") else None
    biased = fields.boolean("attention_bias", False)
    if biased and q_rank is None:
        raise fields.error("attention_bias", "without q_lora_rank is not supported")
    rope = read_rope(fields, 10_000.0, config.head_dim)
    latent = LatentAttention(
        heads=config.num_attention_heads,
        q_rank=q_rank,
        kv_rank=kv_rank,
        nope=nope,
        rope=config.head_dim,
        value=value,
        rotary=Rotary(config.head_dim, config.rope_theta, interleaved, config.scaling),
        score_scale=(nope + config.head_dim) ** -0.5 * rope.latent_factor**2,
        norm_eps=LATENT_EPS,
    )
    return Extras(
        latent=latent,
        qkv_bias=biased,
        out_bias=biased,
        gate=gate,
        shared=Shared(config.moe_intermediate_size * fields.positive("n_shared_experts", most=1024)),
        dense_layers=dense,
        dense_inner=fields.positive("intermediate_size"),
    )
