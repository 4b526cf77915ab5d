"""Granite-MoE: factors of embeddings, branches, scores and logits; the softmax is that of the chosen experts alone."""

from __future__ import annotations

from elastic_ep.models.config_json import ConfigFields
from elastic_ep.models.decoder import Extras, MoeNames, decoder
from elastic_ep.models.decoder_config import DecoderConfig, full_attention, read_config
from elastic_ep.models.spec import Gate, ModelSpec, Parameter, Piece, Scores, Stacked

ARCHITECTURE, MODEL_TYPE = "GraniteMoeForCausalLM", "granitemoe"
NAMES = MoeNames("block_sparse_moe", "", "", "", gate="router.layer", fused_gate="block_sparse_moe.router")


def read(fields: ConfigFields) -> ModelSpec:
    fields.allow("hidden_act", None, "silu")
    full_attention(fields)
    config = read_config(
        fields,
        inner="intermediate_size",
        norm_topk_prob=False,
        default_eps=1e-6,
        default_theta=10_000.0,
        default_top_k=2,
    )
    biased = fields.boolean("attention_bias", False)
    extras = Extras(
        scale=fields.number("attention_multiplier", 1.0),
        qkv_bias=biased,
        out_bias=biased,
        gate=Gate(Scores.SOFTMAX_OF_CHOSEN),
        embed_factor=fields.number("embedding_multiplier", 1.0),
        branch_factor=fields.number("residual_multiplier", 1.0),
        logits_divisor=fields.number("logits_scaling", 1.0),
        experts=_experts,
    )
    return decoder(MODEL_TYPE, config, NAMES, extras=extras)


def _experts(prefix: str, config: DecoderConfig) -> tuple[Parameter, ...]:
    hidden, inner, count = config.hidden_size, config.moe_intermediate_size, config.num_experts

    def part(name: str, tensor: str, rows: int, columns: int) -> Parameter:
        stacked = Stacked(
            f"{prefix}block_sparse_moe.{tensor}.weight",
            (count, columns, rows),
            stride=rows * columns,
            also=f"{prefix}block_sparse_moe.experts.{name}_proj",
        )
        one = f"{prefix}block_sparse_moe.experts.{{expert}}.{tensor}.weight"
        return Parameter(name, (rows, columns), (Piece(one, (columns, rows), stacked),))

    return part("gate_up", "input_linear", hidden, 2 * inner), part("down", "output_linear", inner, hidden)
