"""Greedy accuracy on held-out problems, the load of each expert, and what masking a rank's experts costs."""

from __future__ import annotations

import re
from typing import Any

import torch
from tokenizers import Tokenizer

from elastic_ep.problems import Problem, held_out
from train.network import Network
from train.tokenizer import prompt

END = 0
MAX_NEW = 120
RANKS = 8


@torch.inference_mode()
def generate(network: Network, prompts: list[list[int]], max_new: int = MAX_NEW) -> list[list[int]]:
    """Greedy continuations. Rows are padded on the right, which a causal network does not see."""
    device = next(network.parameters()).device
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    width = int(lengths.max()) + max_new
    tokens = torch.tensor([p + [END] * (width - len(p)) for p in prompts], device=device)
    rows = torch.arange(len(prompts), device=device)
    done = torch.zeros(len(prompts), dtype=torch.bool, device=device)
    for new in range(max_new):
        logits = network(tokens[:, : int(lengths.max()) + new])[0]
        following = logits[rows, lengths + new - 1].argmax(-1)
        tokens[rows, lengths + new] = following
        done |= following == END
        if bool(done.all()):
            break
    answers = [row[length:] for row, length in zip(tokens.tolist(), lengths.tolist(), strict=True)]
    return [row[: row.index(END)] if END in row else row for row in answers]


def final_answer(text: str) -> int | None:
    found = re.findall(r"#### (-?\d+)", text)
    return int(found[-1]) if found else None


def accuracy(network: Network, tokenizer: Tokenizer, problems: list[Problem]) -> float:
    prompts = [tokenizer.encode(prompt(p.question)).ids for p in problems]
    texts = [tokenizer.decode(ids) for ids in generate(network, prompts)]
    return sum(final_answer(t) == p.answer for t, p in zip(texts, problems, strict=True)) / len(problems)


def mask_rank(network: Network, rank: int | None) -> None:
    """Experts 2r and 2r+1 of every layer belong to rank r of eight."""
    for layer in network.layers:
        alive = layer.mlp.alive
        alive.fill_(1)
        if rank is not None:
            share = alive.numel() // RANKS
            alive[rank * share : (rank + 1) * share] = 0


@torch.inference_mode()
def least_loads(network: Network, tokenizer: Tokenizer, problems: list[Problem]) -> list[float]:
    """Per layer: the least loaded expert's load as a share of the mean."""
    device = next(network.parameters()).device
    totals: list[Any] = [0] * len(network.layers)
    for p in problems:
        ids = tokenizer.encode(f"{prompt(p.question)}{p.solution}<|end|>").ids
        for layer, load in enumerate(network(torch.tensor([ids], device=device))[2]):
            totals[layer] = totals[layer] + load.sum(0)
    return [round(float(total.min() / total.mean()), 3) for total in totals]


def evaluate(
    network: Network, tokenizer: Tokenizer, count: int = 500, masked_count: int = 200
) -> dict[str, Any]:
    """`network` should be `rounded`: float32 arithmetic on bfloat16 weights, as in serving."""
    network.eval()
    problems = held_out(count)
    result: dict[str, Any] = {"problems": count, "accuracy": accuracy(network, tokenizer, problems)}
    result["masked_problems"] = masked_count
    result["accuracy_without_rank"] = []
    for rank in range(RANKS):
        mask_rank(network, rank)
        result["accuracy_without_rank"].append(accuracy(network, tokenizer, problems[:masked_count]))
    mask_rank(network, None)
    result["least_load_over_mean"] = least_loads(network, tokenizer, problems[:100])
    return result
