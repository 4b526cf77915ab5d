"""Trains the bundled model.

Needs one GPU and a dozen CPU cores for the data; took five and a half minutes on one H200 with 16 cores.

    python -m train.train --out build/model --minutes 4.5 --compile

`--device cpu --minutes 1 --rows 500 --batch 8` tries it out.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional

from train.conversation import ANSWER, LENGTH, conversation
from train.evaluate import accuracy, evaluate
from train.network import Network, Shape, export, rounded
from train.problems import held_out, problem
from train.tokenizer import save_tokenizer, train_tokenizer

QUESTION_WEIGHT = 0.1
BALANCE_WEIGHT = 0.1
WARM_UP = 300
"""Steps."""


def encode_range(job: tuple[str, int, int, int]) -> npt.NDArray[np.uint16]:
    """Conversations first..first+count of this seed: [count, LENGTH], padded with end tokens."""
    tokenizer_json, seed, first, count = job
    tokenizer = Tokenizer.from_str(tokenizer_json)
    rows = np.zeros((count, LENGTH), dtype=np.uint16)
    for row, index in enumerate(range(first, first + count)):
        numbers = range(index * LENGTH, (index + 1) * LENGTH)
        problems = (problem(seed, number, "train") for number in numbers)
        ids = conversation(tokenizer, random.Random(f"{seed}/{index}/conversation"), problems)
        rows[row, : len(ids)] = ids
    return rows


def make_data(tokenizer: Tokenizer, seed: int, count: int, workers: int) -> npt.NDArray[np.uint16]:
    """[count, LENGTH], made by `workers` processes; the same whatever their number."""
    share = 2_000
    jobs = [(tokenizer.to_str(), seed, first, min(share, count - first)) for first in range(0, count, share)]
    with multiprocessing.get_context("fork").Pool(workers) as pool:
        return np.concatenate(pool.map(encode_range, jobs, chunksize=1))


def loss_of(network: Callable[[Tensor], Any], rows: Tensor) -> tuple[Tensor, Tensor]:
    """rows [B, LENGTH], int64 -> (loss to descend, mean loss per answer token), in nats."""
    tokens = rows & ~ANSWER
    logits, balance, _ = network(tokens)
    target = tokens[:, 1:]
    each = functional.cross_entropy(logits[:, :-1].float().flatten(0, 1), target.flatten(), reduction="none")
    each = each.view_as(target)
    # The padding comes after the last answer, and all answers have the bit.
    inside = (rows.flip(1).cumsum(1).flip(1) > 0)[:, 1:].float()
    is_answer = (rows[:, 1:] >= ANSWER).float()
    is_question = inside * (1 - is_answer)
    answer = (each * is_answer).sum() / is_answer.sum()
    question = (each * is_question).sum() / is_question.sum()
    return answer + QUESTION_WEIGHT * question + BALANCE_WEIGHT * balance, answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/model"))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=4.5)
    parser.add_argument("--rows", type=int, default=600_000)
    parser.add_argument("--batch", type=int, default=256)
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
    rows = make_data(tokenizer, options.seed, options.rows, options.workers)
    data = torch.from_numpy(rows.astype(np.int32)).to(options.device)
    print(f"{len(data)} conversations in {time.monotonic() - began:.0f} s", flush=True)
    network = Network(Shape(vocab_size=tokenizer.get_vocab_size())).to(options.device)
    export(network, options.out)
    train(network, data, tokenizer, options)
    export(network, options.out)
    torch.set_float32_matmul_precision("highest")
    result = evaluate(rounded(network), tokenizer)
    (options.out / "model_eval.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


def train(network: Network, data: Tensor, tokenizer: Tokenizer, options: argparse.Namespace) -> None:
    """AdamW (arXiv 1711.05101) under a cosine (arXiv 1608.03983) over the time budget, `options.minutes`.

    data [rows, LENGTH], int32. The number of steps is whatever the time allows, so a seed does not fix the
    weights. Exports to `options.out` every 20 s.
    """
    optimizer = torch.optim.AdamW(network.parameters(), lr=options.rate, betas=(0.9, 0.98), weight_decay=0.01)
    run = torch.compile(network) if options.compile else network
    began, budget, step, reported = time.monotonic(), options.minutes * 60, 0, 0.0
    while (elapsed := time.monotonic() - began) < budget:
        share = elapsed / budget
        cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * share))
        rate = options.rate * min(1.0, (step + 1) / WARM_UP) * cosine
        for group in optimizer.param_groups:
            group["lr"] = rate
        rows = data[torch.randint(len(data), (options.batch,), device=data.device)].long()
        with torch.autocast(options.device, dtype=torch.bfloat16):
            loss, answer = loss_of(run, rows)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
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
