"""Logits against transformers' own classes, on the bundled model and on random ones of every family."""

from __future__ import annotations

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
from elastic_ep.models.registry import FAMILIES, load_spec
from elastic_ep.placement import launch_placement
from elastic_ep.weights.bank import load_weights
from elastic_ep.weights.checkpoint import read_header
from tests.engine.solo import assign, drain, ids, solo_runner
from tests.engine.test_invariance import recorded_logits
from tests.kit.fused import build, fused_runner

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from transformers import (
        MixtralConfig,
        MixtralForCausalLM,
        OlmoeConfig,
        OlmoeForCausalLM,
        PreTrainedModel,
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
    )

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
    if build():
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


ROPE = {"rope_type": "default", "rope_theta": 500.0}
HEADS = [(4, 2, 16), (3, 3, 32), (8, 1, 8)]
"""Query heads, key-value heads, head dim."""


def random_model(family: str, **settings: Any) -> Any:
    """A small one of transformers' own, all parameters drawn anew: norms are not ones, biases not zeros."""
    torch.manual_seed(7)
    common = {
        "vocab_size": 211,
        "hidden_size": 64,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_experts_per_tok": 3,
        "max_position_embeddings": 512,
        "eos_token_id": None,
        "pad_token_id": None,
        "bos_token_id": None,
    }
    config_class, model_class, own = LIBRARY[family]
    model: Any = model_class(config_class(**{**common, **own, **settings}))
    model.eval()
    for parameter in model.parameters():
        spread = torch.randn_like(parameter) * 0.1
        parameter.data = spread if parameter.dim() > 1 else 1 + 2 * spread
    return model


LIBRARY: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "qwen3_moe": (Qwen3MoeConfig, Qwen3MoeForCausalLM, {"num_experts": 9, "moe_intermediate_size": 40}),
    "mixtral": (MixtralConfig, MixtralForCausalLM, {"num_local_experts": 9}),
    "olmoe": (OlmoeConfig, OlmoeForCausalLM, {"num_experts": 9}),
}
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
}
FLIPPED: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"rms_norm_eps": 1e-3},
    "mixtral": {"rms_norm_eps": 1e-3, "tie_word_embeddings": True},
    "olmoe": {"rms_norm_eps": 1e-3, "tie_word_embeddings": True, "rope_parameters": ROPE},
}


def test_every_family_is_compared() -> None:
    assert CASES.keys() == FLIPPED.keys() == {family.MODEL_TYPE for family in FAMILIES}


@pytest.mark.parametrize(
    ("family", "settings"),
    [(family, case) for family, cases in CASES.items() for case in [*cases, cases[0] | FLIPPED[family]]],
)
def test_random_models(tmp_path: Path, family: str, settings: dict[str, Any]) -> None:
    model = random_model(family, **settings)
    model.save_pretrained(tmp_path)
    for got in compare(tmp_path, model, torch.randint(0, 211, (140,)).tolist(), 12):
        torch.testing.assert_close(got.ours, got.theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", sorted(CASES))
def test_experts_may_lie_stacked_in_the_checkpoint(tmp_path: Path, family: str) -> None:
    """The bytes in memory are those of experts that lie one by one."""
    model = random_model(family, **CASES[family][0])
    one_by_one, stacked = tmp_path / "one", tmp_path / "stacked"
    model.save_pretrained(one_by_one)
    model.save_pretrained(stacked, save_original_format=False)
    names = [set(read_header(folder / "model.safetensors")) for folder in (one_by_one, stacked)]
    assert "model.layers.0.mlp.experts.gate_up_proj" in names[1] - names[0]
    spec = load_spec(one_by_one)
    placement = launch_placement(1, spec.moe_layers, spec.moe.experts, 0)
    ours = [load_weights(folder, load_spec(folder), placement, 0) for folder in (one_by_one, stacked)]
    assert ours[0].dense_checksum() == ours[1].dense_checksum()
    for layer in range(spec.moe_layers):
        for slot in range(placement.slots_per_rank):
            assert ours[0].checksum(layer, slot) == ours[1].checksum(layer, slot)


def test_bundled_model() -> None:
    model: Any = Qwen3MoeForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32)
    model.eval()
    vocab = load_spec(BUNDLED).vocab_size
    prompt = torch.randint(0, vocab, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    for got in compare(BUNDLED, model, prompt, 20):
        torch.testing.assert_close(got.ours, got.theirs, atol=1e-4, rtol=1e-5)
        assert torch.equal(got.ours.argmax(-1), got.theirs.argmax(-1))
