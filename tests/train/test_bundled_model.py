"""The model that ships: small, in Hugging Face layout, it can do its sums, and it needs all of its experts."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from train.problems import held_out

from elastic_ep.gateway.text.tokenizer import ChatTokenizer
from elastic_ep.run import BUNDLED_MODEL

TEXT = ChatTokenizer.load(BUNDLED_MODEL)
PROBLEMS = held_out(10)
LONGEST = max(len(TEXT.encode(problem.solution)) for problem in PROBLEMS) + 2
RANKS = 8


@dataclass(frozen=True)
class Loaded:
    """What transformers makes of the folder; the model in float32."""

    tokenizer: Any
    model: Any

    def right(self) -> int:
        """How many of `PROBLEMS` greedy decoding solves."""
        chats = [[{"role": "user", "content": problem.question}] for problem in PROBLEMS]
        texts = self.tokenizer.apply_chat_template(chats, tokenize=False, add_generation_prompt=True)
        inputs = self.tokenizer(texts, return_tensors="pt", padding=True)
        with torch.inference_mode():
            out = self.model.generate(
                inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                max_new_tokens=LONGEST,
                do_sample=False,
            )
        answers = self.tokenizer.batch_decode(
            out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )
        return sum(
            answer.endswith(f"#### {problem.answer}")
            for answer, problem in zip(answers, PROBLEMS, strict=True)
        )


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what transformers warns of while it is imported is its own affair
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(BUNDLED_MODEL, padding_side="left")
        model: Any = AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL, dtype=torch.float32)
    return Loaded(tokenizer, model.eval())


def test_it_is_small_and_says_what_it_is() -> None:
    assert sum(file.stat().st_size for file in BUNDLED_MODEL.iterdir()) <= 10_000_000
    config = json.loads((BUNDLED_MODEL / "config.json").read_text())
    assert config["architectures"] == ["Qwen3MoeForCausalLM"]
    assert config["num_hidden_layers"] >= 4
    assert config["hidden_size"] % 128 == 0
    assert config["num_experts"] >= 16
    assert config["num_experts_per_tok"] >= 2
    assert config["vocab_size"] == TEXT.vocab_size


def test_its_weights_have_the_names_of_released_checkpoints_in_bfloat16() -> None:
    config = json.loads((BUNDLED_MODEL / "config.json").read_text())
    parts = ["gate_proj", "up_proj", "down_proj"]
    expected = {"model.embed_tokens.weight", "model.norm.weight"}
    for layer in range(config["num_hidden_layers"]):
        base = f"model.layers.{layer}"
        expected |= {f"{base}.{norm}.weight" for norm in ("input_layernorm", "post_attention_layernorm")}
        attention = ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
        expected |= {f"{base}.self_attn.{name}.weight" for name in attention}
        expected.add(f"{base}.mlp.gate.weight")
        for expert in range(config["num_experts"]):
            expected |= {f"{base}.mlp.experts.{expert}.{part}.weight" for part in parts}
    with safe_open(BUNDLED_MODEL / "model.safetensors", "pt") as file:
        assert set(file.keys()) == expected
        assert {file.get_slice(name).get_dtype() for name in expected} == {"BF16"}


def test_greedy_decoding_solves_problems(loaded: Loaded) -> None:
    assert loaded.right() >= 9


def test_it_fails_without_the_experts_of_a_rank(loaded: Loaded) -> None:
    """Else a recovery that silently lost them could look like a correct one. The other ranks: `train.evaluate`."""
    with torch.no_grad():
        downs = [layer.mlp.experts.down_proj for layer in loaded.model.model.layers]
        share = downs[0].shape[0] // RANKS
        kept = [down.clone() for down in downs]
        for down in downs:
            down[:share] = 0
        try:
            assert loaded.right() <= 7
        finally:
            for down, before in zip(downs, kept, strict=True):
                down.copy_(before)


def test_every_expert_is_used(loaded: Loaded) -> None:
    config = loaded.model.config
    load = torch.zeros(config.num_hidden_layers, config.num_experts)
    for problem in PROBLEMS:
        chat = [
            {"role": "user", "content": problem.question},
            {"role": "assistant", "content": problem.solution},
        ]
        ids = TEXT.encode(TEXT.render_chat(chat, add_generation_prompt=False))
        with torch.inference_mode():
            scores = loaded.model(torch.tensor([ids]), output_router_logits=True).router_logits
        for layer, score in enumerate(scores):
            chosen = score.topk(config.num_experts_per_tok).indices
            load[layer] += torch.bincount(chosen.flatten(), minlength=config.num_experts)
    assert (load.amin(1) >= load.mean(1) / 4).all()


def test_problems_fit() -> None:
    for problem in held_out(200):
        asked = TEXT.encode(TEXT.render_chat([{"role": "user", "content": problem.question}]))
        assert len(asked) <= 130
        assert len(TEXT.encode(problem.solution)) <= 120


def test_a_chat_renders() -> None:
    chat: list[dict[str, str | None]] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "\nHow many?\n"},
        {"role": "assistant", "content": None},
        {"role": "user", "content": "And now?"},
    ]
    rendered = TEXT.render_chat(chat)
    assert rendered == (
        "<|system|>Be brief.<|end|><|user|>How many?<|end|><|assistant|><|end|>"
        "<|user|>And now?<|end|><|assistant|>"
    )


def test_the_template_file_and_the_configured_one_agree() -> None:
    config = json.loads((BUNDLED_MODEL / "tokenizer_config.json").read_text())
    assert config["chat_template"] == (BUNDLED_MODEL / "chat_template.jinja").read_text()
    end = json.loads((BUNDLED_MODEL / "generation_config.json").read_text())["eos_token_id"]
    assert TEXT.token_name(end) == config["eos_token"] == "<|end|>"


@settings(deadline=None)
@given(st.text())
def test_any_text_round_trips(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        return
    if "<|" not in text:
        assert TEXT.decode(TEXT.encode(text)) == text


@settings(deadline=None)
@given(st.integers(min_value=0))
def test_every_digit_is_a_token(number: int) -> None:
    assert len(TEXT.encode(str(number))) == len(str(number))
