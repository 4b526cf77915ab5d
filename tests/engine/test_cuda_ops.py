"""What the engine for GPUs does between its kernels, with plain torch in their place: every family that they know.

The kernels themselves are tried in tests/engine/kernels/, engine and kernels together in tests/engine/cuda/.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch

from elastic_ep.config import EngineLimits
from elastic_ep.engine.ops_cpu.runner import ModelRunner
from elastic_ep.engine.ops_cuda import ops
from elastic_ep.models.known import CUDA, unknown
from elastic_ep.models.spec import ModelSpec
from elastic_ep.placement import launch_placement
from tests.engine.cuda.solo import cuda_runner, recorded
from tests.engine.solo import SoloExchange, assign, drain, dummy_weights
from tests.engine.test_invariance import recorded_logits
from tests.kit import plain_kernels
from tests.models.small import LLAMA3, OWN, YARN, small_spec

LIMITS = EngineLimits(max_model_len=100, max_num_seqs=4, max_num_batched_tokens=24, num_pages=40)
PROMPTS = [(7 * i * i + 3 * i + 5) % 200 for i in range(27)], [11, 4, 150]
NEW = 4
SPECS = {name: small_spec(name) for name in sorted(OWN)}
SPECS = {name: spec for name, spec in SPECS.items() if not unknown(spec, CUDA)} | {
    "glm4_moe with all flags": small_spec(
        "glm4_moe", use_qk_norm=True, attention_bias=True, n_group=4, topk_group=2
    ),
    "deepseek_v2 with groups": small_spec(
        "deepseek_v2", topk_method="group_limited_greedy", n_group=4, topk_group=2, q_lora_rank=None
    ),
    "deepseek_v3 as trained further": small_spec(
        "deepseek_v3", rope_parameters={**YARN, "mscale": 1.0, "mscale_all_dim": 0.7}, attention_bias=True
    ),
    "deepseek_v3 in halves": small_spec("deepseek_v3", rope_interleave=False),
    "qwen3_moe with dense layers": small_spec(
        "qwen3_moe", mlp_only_layers=[1], attention_bias=True, rope_parameters=LLAMA3
    ),
    "llama4_text with other layers": small_spec(
        "llama4_text", moe_layers=[1], attention_bias=True, attention_chunk_size=8
    ),
    "gpt_oss with narrow windows": small_spec("gpt_oss", sliding_window=5),
    "ernie4_5_moe with biases": small_spec("ernie4_5_moe", use_bias=True),
    "granitemoe with factors": small_spec(
        "granitemoe",
        attention_multiplier=0.3,
        embedding_multiplier=3.0,
        residual_multiplier=0.4,
        logits_scaling=5.0,
    ),
}


def dense(
    x: torch.Tensor,
    w: torch.Tensor,
    *,
    out_dtype: torch.dtype | None = None,
    into: torch.Tensor | None = None,
) -> torch.Tensor:
    return (x @ w).to(out_dtype or x.dtype) if into is None else into.copy_(x @ w)


def decode_attention(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    lengths: torch.Tensor,
    **more: Any,
) -> torch.Tensor:
    bounds = torch.arange(len(q) + 1)
    return prefill_attention(q, keys, values, tables, bounds, lengths, **more)


def prefill_attention(q: torch.Tensor, *rest: torch.Tensor, scale: float, **more: Any) -> torch.Tensor:
    return plain_kernels.paged_attention(q * (scale * q.shape[-1] ** 0.5), *rest, **more)


def latent_decode(
    q: torch.Tensor, latents: torch.Tensor, tables: torch.Tensor, lengths: torch.Tensor, **more: Any
) -> torch.Tensor:
    bounds = torch.arange(len(q) + 1)
    return plain_kernels.latent_attention(q, latents, tables, bounds, lengths, **more)


def expert_ffn(
    packed: torch.Tensor,
    counts: torch.Tensor,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    *,
    expected_rows: int,
    out: torch.Tensor,
    **more: Any,
) -> torch.Tensor:
    return out.copy_(plain_kernels.expert_ffn(packed, counts, gate_up, down, **more))


@pytest.fixture
def _plain_kernels() -> Iterator[None]:
    with mock.patch.multiple(
        ops,
        dense=dense,
        decode_attention=decode_attention,
        prefill_attention=prefill_attention,
        expert_ffn=expert_ffn,
        gate=plain_kernels.gate,
        add_rms_norm=plain_kernels.add_rms_norm,
        norm_rope_write=plain_kernels.norm_rope_write,
        by_head=plain_kernels.by_head,
        latent_write=plain_kernels.latent_write,
        latent_decode=latent_decode,
        latent_prefill=plain_kernels.latent_attention,
    ):
        yield


def on_processor(spec: ModelSpec) -> dict[tuple[int, int], torch.Tensor]:
    placement = launch_placement(1, spec.moe_layers, spec.moe.experts, 0)
    exchange = SoloExchange(spec.moe.experts)
    runner = ModelRunner(LIMITS, dummy_weights(spec, placement), placement, 0, exchange)
    for number, prompt in enumerate(PROMPTS):
        runner.add(assign(number, prompt, max_tokens=NEW))
    with recorded_logits() as seen:
        drain(runner)
    return seen


@pytest.mark.usefixtures("_plain_kernels")
@pytest.mark.parametrize("name", sorted(SPECS))
def test_logits_are_those_of_the_processor(name: str) -> None:
    expected = on_processor(SPECS[name])
    runner, _ = cuda_runner(torch.device("cpu"), SPECS[name], dtype=torch.float32)
    for number, prompt in enumerate(PROMPTS):
        runner.add(assign(number, prompt, max_tokens=NEW))
    with recorded() as seen:
        drain(runner)
    assert seen.keys() == expected.keys()
    for key, row in expected.items():
        torch.testing.assert_close(seen[key], row, rtol=0, atol=2e-6 * float(row.abs().max()))
