"""The shape of Qwen3-30B-A3B, as its published configuration has it; benches take it with fewer layers."""

from __future__ import annotations

from elastic_ep.models.decoder_config import DecoderConfig

QWEN3_30B = DecoderConfig(
    vocab_size=151936,
    hidden_size=2048,
    num_hidden_layers=48,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=128,
    num_experts=128,
    num_experts_per_tok=8,
    moe_intermediate_size=768,
    max_position_embeddings=32768,
    norm_topk_prob=True,
    tie_word_embeddings=False,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    eos_token_ids=(),
)
_OF_A_LAYER = (
    "hidden_size",
    "moe_intermediate_size",
    "num_experts",
    "num_experts_per_tok",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)


def layers_30b(layers: int) -> dict[str, int]:
    """What a config.json says of so many of its layers."""
    return {
        **{name: getattr(QWEN3_30B, name) for name in _OF_A_LAYER},
        "intermediate_size": 6144,
        "num_hidden_layers": layers,
    }
