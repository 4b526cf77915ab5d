"""Layers of published sizes on a device: each kernel against plain torch, and bits that must not change."""

from __future__ import annotations

import pytest
import torch

from elastic_ep.config import EngineLimits
from elastic_ep.engine.ops_cuda.inputs import TILE_ROWS
from elastic_ep.engine.ops_cuda.kernels.expert_ffn import expert_ffn
from elastic_ep.engine.ops_cuda.runner import CudaRunner
from elastic_ep.models.formats import Format, Fp8, Int4, Mxfp4
from elastic_ep.models.spec import LatentAttention, ModelSpec, Norm
from elastic_ep.placement import launch_placement
from elastic_ep.weights.bank import Held, Weights, dummy_source
from tests.engine.cuda.checked import check_experts, checked, exact_expert
from tests.engine.cuda.solo import Logits, recorded
from tests.engine.solo import assign, drain, ids
from tests.kit.coded_experts import scaled
from tests.kit.published import PUBLISHED, published
from tests.kit.solo_exchange import SoloDeviceExchange

LIMITS = EngineLimits(max_model_len=256, max_num_seqs=32, max_num_batched_tokens=128, num_pages=64)
PROMPT = [(7 * i * i + 3 * i + 5) % 20011 for i in range(150)]
SHORT = [11, 4, 150]
NEW = 4


def weights_of(spec: ModelSpec, device: torch.device) -> Weights:
    placement = launch_placement(1, spec.moe_layers, spec.moe.experts, 0)
    source = dummy_source(spec, 0, device)
    return Weights(spec, placement, 0, source, device, torch.bfloat16, held=Held.CODES)


def runner_of(weights: Weights, *, graphs: bool) -> CudaRunner:
    spec, device = weights.spec, weights.embed.device
    placement = launch_placement(1, spec.moe_layers, spec.moe.experts, 0)
    exchange = SoloDeviceExchange(spec.moe.experts, device)
    return CudaRunner(LIMITS, weights, placement, 0, exchange, tile=TILE_ROWS, graphs=graphs)


def every_kernel_is_right(weights: Weights) -> tuple[list[int], Logits]:
    """A prompt in two chunks, decodes beside one, and decodes: the tokens and logits of the first."""
    runner = runner_of(weights, graphs=False)
    runner.add(assign(1, PROMPT, max_tokens=NEW))
    runner.add(assign(2, SHORT, max_tokens=NEW))
    with checked(runner._inputs) as calls, recorded() as seen:
        tokens = ids(drain(runner)[1])
    latent = isinstance(weights.spec.attention, LatentAttention)
    written, decoded, prompts = (
        ("latent_write", "latent_decode", "latent_prefill")
        if latent
        else ("norm_rope_write", "decode_attention", "prefill_attention")
    )
    assert {"dense", "expert_ffn", written, decoded, prompts} <= calls.keys()
    assert weights.spec.norm is Norm.LAYER or calls["add_rms_norm"]
    assert calls["gate"] or calls["choose"]
    return tokens, seen


def continued(weights: Weights, tokens: list[int], *, graphs: bool) -> tuple[list[int], Logits]:
    """The same text from its third token on, as after a move: in graphs, and in other company."""
    runner = runner_of(weights, graphs=graphs)
    if graphs:
        runner.warm_up()
    runner.add(assign(7, SHORT, max_tokens=3))
    runner.run_step(0, schedule=True)
    runner.add(assign(1, PROMPT, tokens[:2], max_tokens=NEW))
    for other in range(8, 28):
        runner.add(assign(other, PROMPT[: 3 + other % 5], max_tokens=3))
    with recorded() as seen:
        return ids(drain(runner)[1]), seen


def check_layers(spec: ModelSpec, device: torch.device, *, graphs: bool) -> None:
    weights = weights_of(spec, device)
    tokens, alone = every_kernel_is_right(weights)
    assert all(row.isfinite().all() for row in alone.values())
    again, seen = continued(weights, tokens, graphs=graphs)
    assert again == tokens[2:]
    compared = [key for key in seen if key[0] == 1]
    assert len(compared) == NEW - 2
    for key in compared:
        assert torch.equal(seen[key], alone[key]), key


@pytest.mark.timeout(300)
@pytest.mark.parametrize("name", PUBLISHED)
def test_layers_of(device: torch.device, name: str) -> None:
    # What is captured may not be on the default stream.
    with torch.cuda.stream(torch.cuda.Stream(device)):
        check_layers(published(name), device, graphs=True)
    torch.cuda.empty_cache()


EXPERTS: dict[str, tuple[int, int, int, Format]] = {
    "DeepSeek-V3": (7168, 2048, 64, Fp8(128, 128, "weight_scale_inv")),
    "DeepSeek-V3, its weights alone": (7168, 2048, 64, Fp8(128, 128, "weight_scale_inv", weights_alone=True)),
    "gpt-oss": (2880, 2880, 32, Mxfp4()),
    "Qwen3-30B in INT4": (2048, 768, 128, Int4(128, zero_points=True)),
}
"""Hidden size, width of an expert, slots of a rank."""


@pytest.mark.parametrize("expected_rows", [1, 1000])
@pytest.mark.parametrize("name", EXPERTS)
def test_experts_of(device: torch.device, name: str, expected_rows: int) -> None:
    hidden, inner, slots, made = EXPERTS[name]
    gate_up = scaled(made, [(inner, hidden)] * 2, slots, device)
    down = scaled(made, [(hidden, inner)], slots, device)
    counts = torch.randint(0, 9, (slots,), dtype=torch.int32, device=device)
    counts[:5] = torch.tensor([0, 1, 64, 65, 200])
    packed = torch.randn(slots, 256, hidden, device=device, dtype=torch.bfloat16)
    y = expert_ffn(packed, counts, gate_up, down, expected_rows=expected_rows)
    rows = [(slot, count) for slot, count in enumerate(counts.tolist())]
    exact = [exact_expert(packed[slot, :count], slot, gate_up, down) for slot, count in rows]
    check_experts(torch.cat([y[slot, :count] for slot, count in rows]), torch.cat(exact), gate_up)
