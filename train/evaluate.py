"""Greedy accuracy on held-out problems, the load of each expert, and what masking a rank's experts costs.

Offline, in plain torch, in float32 on the checkpoint's bfloat16 weights, as the runtime serves them. Needs no GPU
(see README.md here for how long it took):

    python -m train.evaluate --model src/elastic_ep/assets/model --out bench/results/model_eval.json
"""

from __future__ import annotations

import argparse
import json
import re
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer

from train.network import Network, Past, load
from train.problems import Problem, held_out
from train.tokenizer import prompt

END = 0
MAX_NEW = 120
"""Tokens; the longest solutions take about 80."""
RANKS = 8


@torch.inference_mode()
def generate(network: Network, prompts: list[list[int]], max_new: int = MAX_NEW) -> list[list[int]]:
    """Greedy continuations of token ids, in one batch, each up to its end token (left out)."""
    device = network.cos.device
    width = max(len(ids) for ids in prompts)
    tokens = torch.tensor([[END] * (width - len(ids)) + ids for ids in prompts], device=device)
    past = Past(padding=torch.tensor([width - len(ids) for ids in prompts], device=device))
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    found = []
    for _ in range(max_new):
        tokens = network(tokens, past)[0][:, -1:].argmax(-1)
        found.append(tokens)
        done |= tokens[:, 0] == END
        if bool(done.all()):
            break
    rows: list[list[int]] = torch.cat(found, 1).tolist()
    return [row[: row.index(END)] if END in row else row for row in rows]


def final_answer(text: str) -> int | None:
    """The number after the last `####`, if there is one."""
    found = re.findall(r"#### (-?\d+)", text)
    return int(found[-1]) if found else None


def accuracy(
    network: Network, tokenizer: Tokenizer, problems: list[Problem], prompts: list[str] | None = None
) -> float:
    """The share of `problems` whose final answer is right, from 0 to 1; `prompts` put them otherwise than usual."""
    asked = prompts or [prompt(p.question) for p in problems]
    texts = [
        tokenizer.decode(ids) for ids in generate(network, [tokenizer.encode(text).ids for text in asked])
    ]
    return sum(final_answer(t) == p.answer for t, p in zip(texts, problems, strict=True)) / len(problems)


def accuracy_of_forms(network: Network, tokenizer: Tokenizer, problems: list[Problem]) -> dict[str, float]:
    """Accuracy when the same problems are put otherwise; the earlier turn is the next problem and its solution."""
    earlier = [f"{prompt(p.question)}{p.solution}<|end|>" for p in [*problems[1:], problems[0]]]
    forms = {
        "second_turn": [e + prompt(p.question) for e, p in zip(earlier, problems, strict=True)],
        "unseen_system_message": [prompt(p.question, "You are a math tutor for children.") for p in problems],
        "unseen_words_before": [prompt(f"Can you work this out? {p.question}") for p in problems],
        "one_sentence_a_line": [prompt(p.question.replace(". ", ".\n")) for p in problems],
        "plain_completion": [p.question for p in problems],
        "plain_completion_after_newline": [f"{p.question}\n" for p in problems],
    }
    return {name: accuracy(network, tokenizer, problems, texts) for name, texts in forms.items()}


def mask_rank(network: Network, rank: int | None) -> None:
    """Silence the experts of one rank of eight: 2r and 2r+1 of sixteen, in every layer. None: all speak again."""
    for layer in network.stack():
        alive = layer.mlp.alive
        alive.fill_(1)
        if rank is not None:
            share = alive.numel() // RANKS
            alive[rank * share : (rank + 1) * share] = 0


@torch.inference_mode()
def loads(network: Network, tokenizer: Tokenizer, problems: list[Problem]) -> list[list[int]]:
    """[layers, experts]: how many of the problems' tokens, prompt and solution, chose each expert."""
    total = torch.zeros(network.shape.layers, network.shape.experts)
    for p in problems:
        ids = tokenizer.encode(f"{prompt(p.question)}{p.solution}<|end|>").ids
        chosen = network(torch.tensor([ids], device=network.cos.device))[2]
        total += torch.stack([layer.sum(0) for layer in chosen]).cpu()
    return [[int(count) for count in layer] for layer in total]


def evaluate(network: Network, tokenizer: Tokenizer, count: int = 500) -> dict[str, Any]:
    """`network` should come from `load` or `rounded`: float32 arithmetic on bfloat16 weights, as in serving."""
    network.eval()
    problems = held_out(count)
    result: dict[str, Any] = {"problems": count, "accuracy": accuracy(network, tokenizer, problems)}
    result["accuracy_of_forms"] = accuracy_of_forms(network, tokenizer, problems[:100])
    result["accuracy_without_rank"] = []
    for rank in range(RANKS):
        mask_rank(network, rank)
        result["accuracy_without_rank"].append(accuracy(network, tokenizer, problems))
    mask_rank(network, None)
    load_of = loads(network, tokenizer, problems)
    result["least_load_over_mean"] = [round(min(row) * len(row) / sum(row), 3) for row in load_of]
    result["expert_load"] = load_of
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=Path("src/elastic_ep/assets/model"))
    parser.add_argument("--out", type=Path, default=Path("bench/results/model_eval.json"))
    parser.add_argument("--problems", type=int, default=500)
    options = parser.parse_args()

    network, tokenizer = load(options.model), Tokenizer.from_file(str(options.model / "tokenizer.json"))
    began = time.monotonic()
    result = evaluate(network, tokenizer, options.problems)
    result |= {
        "device": "cpu",
        "dtype": "float32 arithmetic on bfloat16 weights",
        "seconds": round(time.monotonic() - began),
        "parameters": sum(p.numel() for p in network.parameters()),
    }
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
