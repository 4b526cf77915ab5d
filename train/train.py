"""Trains the bundled model.

Needs one GPU (see README.md here for what it took); `--device cpu --minutes 1 --problems 2000` tries it out.

    python -m train.train --out build/model --minutes 7
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import time
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer

from elastic_ep.problems import held_out, problem
from train.evaluate import accuracy, evaluate
from train.network import Network, Shape, export, rounded
from train.tokenizer import SPECIAL, prompt, save_tokenizer, train_tokenizer

LENGTH = 192
SYSTEM_SHARE = 16
SYSTEM = "You are a careful assistant. Solve the problem step by step."
QUESTION_WEIGHT = 0.1
BALANCE_WEIGHT = 0.1


def encode_range(job: tuple[str, int, int, int]) -> npt.NDArray[np.uint16]:
    """Rows [count, LENGTH + 1]: the answer's start, then the tokens; too long ones are left out."""
    tokenizer_json, seed, first, count = job
    tokenizer = Tokenizer.from_str(tokenizer_json)
    rows = []
    for index in range(first, first + count):
        drawn = problem(seed, index, "train")
        head = tokenizer.encode(prompt(drawn.question, SYSTEM if index % SYSTEM_SHARE == 0 else None)).ids
        ids = head + tokenizer.encode(f"{drawn.solution}<|end|>").ids
        if len(ids) <= LENGTH:
            rows.append([len(head), *ids, *[0] * (LENGTH - len(ids))])
    return np.array(rows, dtype=np.uint16)


def make_data(tokenizer: Tokenizer, seed: int, count: int, workers: int) -> npt.NDArray[np.uint16]:
    share = 5_000
    jobs = [(tokenizer.to_str(), seed, first, min(share, count - first)) for first in range(0, count, share)]
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        return np.concatenate(pool.map(encode_range, jobs, chunksize=1))


def loss_of(network: torch.nn.Module, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss to descend, loss on the answers alone)."""
    answer_at, tokens = rows[:, :1], rows[:, 1:]
    logits, balance, _ = network(tokens)
    target = tokens[:, 1:]
    each = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), target.flatten(), reduction="none").view_as(
        target
    )
    position = torch.arange(1, LENGTH, device=rows.device)
    is_answer = (position >= answer_at).float()
    # The end token is also the padding: the first one after the answer counts, the rest does not.
    ended = ((target == 0) & (position >= answer_at)).float().cumsum(1)
    real = ((ended == 0) | ((ended == 1) & (target == 0))).float()
    answer = (each * is_answer * real).sum() / (is_answer * real).sum()
    question = (each * (1 - is_answer)).sum() / (1 - is_answer).sum()
    return answer + QUESTION_WEIGHT * question + BALANCE_WEIGHT * balance, answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/model"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=7.0)
    parser.add_argument("--problems", type=int, default=1_500_000)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--workers", type=int, default=16)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--compile", action="store_true")
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    tokenizer = train_tokenizer(options.seed)
    save_tokenizer(tokenizer, options.out)
    began = time.monotonic()
    data = torch.from_numpy(
        make_data(tokenizer, options.seed, options.problems, options.workers).astype(np.int32)
    )
    data = data.to(options.device)
    print(f"{len(data)} problems in {time.monotonic() - began:.0f} s", flush=True)
    assert tokenizer.get_vocab_size() > len(SPECIAL)
    network = Network(Shape(vocab_size=tokenizer.get_vocab_size())).to(options.device)
    export(network, options.out)
    train(network, data, tokenizer, options)
    export(network, options.out)
    result = evaluate(rounded(network), tokenizer)
    result |= {
        "minutes": options.minutes,
        "seed": options.seed,
        "parameters": sum(p.numel() for p in network.parameters()),
    }
    (options.out / "model_eval.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def train(network: Network, data: torch.Tensor, tokenizer: Tokenizer, options: argparse.Namespace) -> None:
    """AdamW under a cosine over the time budget, whatever number of steps that allows."""
    optimizer = torch.optim.AdamW(network.parameters(), lr=options.rate, betas=(0.9, 0.98), weight_decay=0.01)
    run = torch.compile(network) if options.compile else network
    began, budget, step, reported = time.monotonic(), options.minutes * 60, 0, 0.0
    while (elapsed := time.monotonic() - began) < budget:
        share = elapsed / budget
        rate = (
            options.rate * min(1.0, (step + 1) / 300) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share)))
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = data[torch.randint(len(data), (options.batch,), device=data.device)].long()
        with torch.autocast(options.device, dtype=torch.bfloat16):
            loss, answer = loss_of(run, rows)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        step += 1
        if elapsed - reported > 20:
            reported = elapsed
            score = accuracy(rounded(network), tokenizer, held_out(100))
            export(network, options.out)
            print(
                f"{elapsed:.0f} s  step {step}  answer loss {answer.item():.4f}  accuracy of 100: {score:.2f}",
                flush=True,
            )


if __name__ == "__main__":
    main()
