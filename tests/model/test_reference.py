"""Logits against transformers' own Qwen3-MoE, on the bundled model and on random ones."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import elastic_ep
from elastic_ep.config import EngineLimits
from elastic_ep.model.config import load_model_config
from elastic_ep.model.weights import load_weights
from elastic_ep.placement import launch_placement

from .solo import assign, drain, ids, solo_runner
from .test_invariance import recorded_logits

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from transformers import PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

BUNDLED = Path(elastic_ep.__file__).parent / "assets" / "model"


@dataclass(frozen=True)
class Compared:
    ours: torch.Tensor
    theirs: torch.Tensor
    """[positions, V]"""


def compare(folder: Path, theirs: PreTrainedModel, prompt: list[int], new_tokens: int) -> Compared:
    """Logits of prompt and greedy continuation: ours step by step, theirs in one go."""
    config = load_model_config(folder)
    placement = launch_placement(1, config.num_hidden_layers, config.num_experts, 0)
    runner = solo_runner(
        config,
        weights=load_weights(folder, config, placement, 0),
        limits=EngineLimits(max_model_len=400, num_pages=30),
    )
    runner.add(assign(1, prompt, max_tokens=new_tokens))
    with recorded_logits() as seen:
        output = ids(drain(runner)[1])
    with torch.no_grad():
        logits = theirs(torch.tensor([prompt + output])).logits[0, len(prompt) - 1 : -1]
    ours = torch.stack([seen[1, len(prompt) + i] for i in range(new_tokens)])
    return Compared(ours, logits)


@pytest.mark.parametrize("norm_topk_prob", [False, True])
@pytest.mark.parametrize("tie_word_embeddings", [False, True])
@pytest.mark.parametrize("heads", [(4, 2, 16), (3, 3, 32), (8, 1, 8)])
def test_random_models(
    tmp_path: Path, norm_topk_prob: bool, tie_word_embeddings: bool, heads: tuple[int, int, int]
) -> None:
    torch.manual_seed(7)
    settings: dict[str, Any] = {
        "vocab_size": 211,
        "hidden_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        "head_dim": heads[2],
        "num_experts": 9,
        "num_experts_per_tok": 3,
        "moe_intermediate_size": 40,
        "max_position_embeddings": 512,
        "norm_topk_prob": norm_topk_prob,
        "tie_word_embeddings": tie_word_embeddings,
    }
    model: Any = Qwen3MoeForCausalLM(Qwen3MoeConfig(**settings))
    model.eval()
    for parameter in model.parameters():
        spread = torch.randn_like(parameter) * 0.1
        parameter.data = spread if parameter.dim() > 1 else 1 + 2 * spread
    model.save_pretrained(tmp_path)
    got = compare(tmp_path, model, torch.randint(0, 211, (140,)).tolist(), 12)
    torch.testing.assert_close(got.ours, got.theirs, atol=1e-5, rtol=1e-5)


def test_bundled_model() -> None:
    model: Any = Qwen3MoeForCausalLM.from_pretrained(BUNDLED, dtype=torch.float32)
    model.eval()
    vocab = load_model_config(BUNDLED).vocab_size
    prompt = torch.randint(0, vocab, (60,), generator=torch.Generator().manual_seed(1)).tolist()
    got = compare(BUNDLED, model, prompt, 20)
    torch.testing.assert_close(got.ours, got.theirs, atol=1e-4, rtol=1e-5)
    assert torch.equal(got.ours.argmax(-1), got.theirs.argmax(-1))
