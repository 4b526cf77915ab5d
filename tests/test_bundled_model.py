"""The model that ships: small, in Hugging Face layout, and it can do its sums."""

from __future__ import annotations

import json
import warnings
from typing import Any

import torch

from elastic_ep.problems import held_out
from elastic_ep.run import BUNDLED_MODEL


def test_it_is_small_and_says_what_it_is() -> None:
    assert sum(file.stat().st_size for file in BUNDLED_MODEL.iterdir()) <= 10_000_000
    config = json.loads((BUNDLED_MODEL / "config.json").read_text())
    assert config["architectures"] == ["Qwen3MoeForCausalLM"]
    assert config["num_hidden_layers"] >= 4
    assert config["hidden_size"] % 128 == 0
    assert config["num_experts"] >= 16
    assert config["num_experts_per_tok"] >= 2


def test_transformers_loads_it_and_it_solves_problems() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what transformers and its dependencies warn of is theirs
        from transformers import AutoModelForCausalLM, AutoTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(BUNDLED_MODEL)
        model: Any = AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL, dtype=torch.float32)
        model.eval()
        right = 0
        for problem in held_out(6):
            chat = [{"role": "user", "content": problem.question}]
            text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
            inputs = tokenizer(text, return_tensors="pt")
            with torch.inference_mode():
                out = model.generate(
                    inputs["input_ids"],
                    attention_mask=inputs["attention_mask"],
                    max_new_tokens=100,
                    do_sample=False,
                )
            answer = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            right += answer.endswith(f"#### {problem.answer}")
    assert right >= 5
