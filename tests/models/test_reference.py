"""Logits against transformers' own classes, on the bundled model and on random ones of every family."""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import elastic_ep
from elastic_ep.config import EngineLimits
from elastic_ep.engine.step_runner import StepRunner
from elastic_ep.models.known import FUSED, unknown
from elastic_ep.models.registry import FAMILIES, load_spec
from elastic_ep.placement import launch_placement
from elastic_ep.weights.bank import load_weights
from elastic_ep.weights.checkpoint import read_header
from tests.engine.solo import assign, drain, ids, solo_runner
from tests.engine.test_invariance import recorded_logits
from tests.kit.fused import build, fused_runner
from tests.kit.quantised import SCHEMES, write_pair
from tests.models.small import COMMON, GROUPS, LLAMA3, OWN, ROPE, YARN

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers
    from transformers import PreTrainedModel, Qwen3MoeForCausalLM

BUNDLED = Path(elastic_ep.__file__).parent / "assets" / "model"


@dataclass(frozen=True)
class Compared:
    ours: torch.Tensor
    theirs: torch.Tensor
    """[positions, V]"""


def compare(folder: Path, theirs: PreTrainedModel, prompt: list[int], new_tokens: int) -> Iterator[Compared]:
    """Of plain torch, and of the engine in C++ if it was built (tests/engine/test_fused.py says if it was not)."""
    spec = load_spec(folder)
    placement = launch_placement(1, spec.moe_layers, spec.moe.experts, 0)
    weights = load_weights(folder, spec, placement, 0)
    limits = EngineLimits(max_model_len=400, num_pages=30)
    yield _compare(solo_runner(spec, weights=weights, limits=limits), theirs, prompt, new_tokens)
    if build() and not unknown(spec, FUSED):
        yield _compare(fused_runner(weights, limits)[0], theirs, prompt, new_tokens)


def _compare(runner: StepRunner, theirs: PreTrainedModel, prompt: list[int], new_tokens: int) -> Compared:
    """Logits of prompt and greedy continuation: ours step by step, theirs in one go."""
    runner.add(assign(1, prompt, max_tokens=new_tokens))
    with recorded_logits() as seen:
        output = ids(drain(runner)[1])
    with torch.no_grad():
        logits = theirs(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1]
    ours = torch.stack([seen[1, len(prompt) + i] for i in range(new_tokens)])
    return Compared(ours, logits)


HEADS = [(4, 2, 16), (3, 3, 32), (8, 1, 8)]
"""Query heads, key-value heads, head dim."""


def random_model(family: str, **settings: Any) -> Any:
    """A small one of transformers' own."""
    kind: Any = getattr(transformers, f"{LIBRARY[family]}ForCausalLM")
    # transformers writes into what it is given.
    return drawn_anew(kind(kind.config_class(**copy.deepcopy({**COMMON, **OWN[family], **settings}))))


def drawn_anew(model: Any) -> Any:
    """With random parameters: norms are not ones, biases not zeros."""
    torch.manual_seed(7)
    model.eval()
    model.set_attn_implementation("eager")  # the others leave gpt-oss's sinks out
    corrections = (buffer for name, buffer in model.named_buffers() if "correction" in name)
    for parameter in [*model.parameters(), *corrections]:
        spread = torch.randn_like(parameter) * 0.1
        parameter.data = spread if parameter.dim() > 1 else 1 + 2 * spread
    return model


LIBRARY = {family.MODEL_TYPE: family.ARCHITECTURE.removesuffix("ForCausalLM") for family in FAMILIES}
CASES: dict[str, list[dict[str, Any]]] = {
    "qwen3_moe": [
        {"norm_topk_prob": norm, "tie_word_embeddings": tied, **heads}
        for norm in (False, True)
        for tied in (False, True)
        for heads in (
            {"num_attention_heads": h, "num_key_value_heads": k, "head_dim": d} for h, k, d in HEADS
        )
    ],
    "mixtral": [
        {"num_attention_heads": h, "num_key_value_heads": k, "head_dim": d, "rope_parameters": ROPE}
        for h, k, d in HEADS
    ],
    # Its norm of keys and queries leaves no choice of the head's size.
    "olmoe": [
        {"num_attention_heads": 4, "num_key_value_heads": k, "clip_qkv": clip, "norm_topk_prob": norm}
        for k, clip, norm in ((4, None, False), (2, 0.8, False), (1, 0.8, True))
    ],
    **{family: [{}] for family in LIBRARY if family not in ("qwen3_moe", "mixtral", "olmoe")},
}
EPS, TIED = {"rms_norm_eps": 1e-3}, {"tie_word_embeddings": True}
FLIPPED: dict[str, list[dict[str, Any]]] = {
    "qwen3_moe": [
        EPS,
        {"attention_bias": True},
        {"mlp_only_layers": [1]},
        {"decoder_sparse_step": 2},
        {"use_sliding_window": True, "sliding_window": 33},
        {"rope_parameters": YARN},
        {"rope_parameters": {**YARN, "truncate": False, "attention_factor": 1.3}},
        {"rope_parameters": LLAMA3},
        {"rope_parameters": {**ROPE, "rope_type": "linear", "factor": 2.0}},
    ],
    "mixtral": [{**EPS, **TIED}, {"sliding_window": 70}],
    "olmoe": [{**EPS, **TIED, "rope_parameters": ROPE}, {"attention_bias": True}],
    "qwen2_moe": [
        {**EPS, **TIED},
        {"qkv_bias": False},
        {"norm_topk_prob": True},
        {"mlp_only_layers": [0], "decoder_sparse_step": 1},
    ],
    "deepseek_v2": [
        {**EPS, **TIED},
        {"topk_method": "group_limited_greedy", **GROUPS},
        {"q_lora_rank": None},
        {"attention_bias": True},
        {"first_k_dense_replace": 0},
        {"routed_scaling_factor": 2.5},
        {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.9}},
    ],
    "deepseek_v3": [
        {**EPS, **TIED},
        {"n_group": 1, "topk_group": 1},
        {"norm_topk_prob": False},
        {"q_lora_rank": None},
        {"attention_bias": True},
        {"first_k_dense_replace": 2},
        {"rope_interleave": False},
        {"rope_parameters": {**YARN, "mscale_all_dim": 1.0}},
        {"rope_parameters": {**YARN, "mscale": 1.0}},
        {"v_head_dim": 8, "kv_lora_rank": 10},
    ],
    "gpt_oss": [
        {**EPS, **TIED},
        {"attention_bias": False},
        {"swiglu_limit": 0.1, "swiglu_alpha": 1.0},
        {"layer_types": ["full_attention", "sliding_attention", "sliding_attention"], "sliding_window": 1},
        {"rope_parameters": ROPE},
    ],
    "glm4_moe": [
        {**EPS, **TIED},
        {"use_qk_norm": True},
        {"attention_bias": True},
        {"norm_topk_prob": False, "routed_scaling_factor": 2.0},
        GROUPS,
        {"rope_parameters": {**YARN, "partial_rotary_factor": 0.25}},
        {"first_k_dense_replace": 0},
    ],
    "phimoe": [
        {**EPS, **TIED},
        {"attention_bias": True},
        {"lm_head_bias": True},
        {"router_jitter_noise": 0.01},
        {"sliding_window": 33},
        {
            "rope_parameters": {
                **ROPE,
                "rope_type": "longrope",
                "factor": 1.0,
                "original_max_position_embeddings": 512,
                "short_factor": [1.0 + 0.1 * i for i in range(8)],
                "long_factor": [3.0] * 8,
                "short_mscale": 1.2,
                "long_mscale": 1.4,
            }
        },
    ],
    "granitemoe": [
        {**EPS, **TIED},
        {"attention_bias": True},
        {"attention_multiplier": 0.3},
        {"embedding_multiplier": 3.0},
        {"residual_multiplier": 0.4},
        {"logits_scaling": 5.0},
    ],
    "ernie4_5_moe": [
        {**EPS, "tie_word_embeddings": False},
        {"use_bias": True},
        {"moe_num_shared_experts": 0},
        {"moe_layer_start_index": 0, "moe_layer_end_index": 1},
        {"moe_layer_interval": 2},
        {"moe_norm_min": 0.9},
    ],
    "minimax_m2": [{**EPS, **TIED}, {"rotary_dim": 24}, {"rope_parameters": YARN}],
    "llama4_text": [
        {**EPS, **TIED},
        {"interleave_moe_layer_step": 2},
        {"moe_layers": [0, 2]},
        {"use_qk_norm": False, "rope_parameters": YARN},
        {"no_rope_layers": [1, 1, 1], "attn_temperature_tuning": False},
        {"no_rope_layers": None, "no_rope_layer_interval": 2, "attn_scale": 0.7},
        {"layer_types": ["full_attention", "chunked_attention", "chunked_attention"]},
        {"attention_bias": True, "attention_chunk_size": 64},
        {"rope_parameters": {**LLAMA3, "high_freq_factor": 1.0}},
    ],
}
ONE_LAYOUT = {"gpt_oss", "llama4_text"}
"""Their experts lie stacked in every checkpoint."""
TRIED = [
    (family, case, 140 if case in cases else 90)
    for family, cases in CASES.items()
    for case in [*cases, *(cases[0] | flipped for flipped in FLIPPED[family])]
]


def test_every_family_is_compared() -> None:
    assert CASES.keys() == FLIPPED.keys() == OWN.keys() == {family.MODEL_TYPE for family in FAMILIES}


@pytest.mark.parametrize(("family", "settings", "length"), TRIED)
def test_random_models(tmp_path: Path, family: str, settings: dict[str, Any], length: int) -> None:
    model = random_model(family, **settings)
    model.save_pretrained(tmp_path)
    for got in compare(tmp_path, model, torch.randint(0, 211, (length,)).tolist(), 6):
        torch.testing.assert_close(got.ours, got.theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", sorted(CASES.keys() - ONE_LAYOUT))
def test_experts_may_lie_stacked_in_the_checkpoint(tmp_path: Path, family: str) -> None:
    """The bytes in memory are those of experts that lie one by one."""
    model = random_model(family, **CASES[family][0])
    one_by_one, stacked = tmp_path / "one", tmp_path / "stacked"
    model.save_pretrained(one_by_one)
    model.save_pretrained(stacked, save_original_format=False)
    names = [set(read_header(folder / "model.safetensors")) for folder in (one_by_one, stacked)]
    assert any(name.endswith("experts.gate_up_proj") for name in names[1] - names[0])
    spec = load_spec(one_by_one)
    placement = launch_placement(1, spec.moe_layers, spec.moe.experts, 0)
    ours = [load_weights(folder, load_spec(folder), placement, 0) for folder in (one_by_one, stacked)]
    assert ours[0].dense_checksum() == ours[1].dense_checksum()
    for layer in range(spec.moe_layers):
        for slot in range(placement.slots_per_rank):
            assert ours[0].checksum(layer, slot) == ours[1].checksum(layer, slot)


def test_the_text_of_a_llama_4_that_sees_images_too(tmp_path: Path) -> None:
    vision = {"image_size": 28, "patch_size": 14, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= dict.fromkeys(
        (
            "hidden_size",
            "intermediate_size",
            "vision_output_dim",
            "projector_input_dim",
            "projector_output_dim",
        ),
        32,
    )
    text = copy.deepcopy({**COMMON, **OWN["llama4_text"]})
    config = transformers.Llama4Config(text_config=text, vision_config=vision)
    model = drawn_anew(transformers.Llama4ForConditionalGeneration(config))
    model.save_pretrained(tmp_path)
    for got in compare(tmp_path, model, torch.randint(0, 211, (60,)).tolist(), 4):
        torch.testing.assert_close(got.ours, got.theirs, atol=1e-5, rtol=1e-5)


def test_bundled_model() -> None:
    model: Any = Qwen3MoeForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32)
    model.eval()
    vocab = load_spec(BUNDLED).vocab_size
    prompt = torch.randint(0, vocab, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    for got in compare(BUNDLED, model, prompt, 20):
        torch.testing.assert_close(got.ours, got.theirs, atol=1e-4, rtol=1e-5)
        assert torch.equal(got.ours.argmax(-1), got.theirs.argmax(-1))


def test_gpt_oss_in_mxfp4(tmp_path: Path) -> None:
    """As its checkpoints lie on the disk: transformers reads the same numbers out of blocks and scales."""
    small = {"hidden_size": 64, "intermediate_size": 32, "num_hidden_layers": 1}
    random_model("gpt_oss", **(CASES["gpt_oss"][0] | small)).save_pretrained(tmp_path / "made")
    config = json.loads((tmp_path / "made" / "config.json").read_text())
    write_pair(tmp_path / "coded", tmp_path / "plain", SCHEMES["mxfp4"], config)
    widened = transformers.Mxfp4Config(dequantize=True)
    model: Any = transformers.GptOssForCausalLM.from_pretrained(
        tmp_path / "coded", quantization_config=widened, dtype=torch.float32
    )
    model.eval()
    model.set_attn_implementation("eager")
    for got in compare(tmp_path / "coded", model, torch.randint(0, 211, (40,)).tolist(), 6):
        torch.testing.assert_close(got.ours, got.theirs, atol=1e-5, rtol=1e-5)
