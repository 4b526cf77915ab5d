"""Generated tokens a second at 64 concurrent requests, against `transformers` on the same model and cores.

    python -m bench.throughput [--out bench/results/throughput.json]

Both sides get the same prompts and stop where the model stops, in turns, in one run. transformers runs one batch of
64 at a time with its key-value cache, all cores, float32, left padding; its best of two batchings counts: in the order
given, and sorted by length (which a server could not do).
"""

from __future__ import annotations

import asyncio
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import aiohttp
import torch
from tests.kit.served import http, percentile, server, write_result
from train.problems import held_out

from bench.kit.command_line import command_line
from elastic_ep.run import BUNDLED_MODEL

CONCURRENT = 64
MAX_NEW = 160


def with_transformers(questions: list[str]) -> tuple[int, float]:
    """(generated tokens, seconds)."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(BUNDLED_MODEL, padding_side="left")
    model: Any = AutoModelForCausalLM.from_pretrained(BUNDLED_MODEL, dtype=torch.float32)
    model.eval()
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": q}], tokenize=False, add_generation_prompt=True
        )
        for q in questions
    ]
    generated = 0
    model.generate(**tokenizer(texts[:2], return_tensors="pt", padding=True), max_new_tokens=4)
    started = time.monotonic()
    for first in range(0, len(texts), CONCURRENT):
        batch = tokenizer(texts[first : first + CONCURRENT], return_tensors="pt", padding=True)
        with torch.inference_mode():
            out = model.generate(**batch, max_new_tokens=MAX_NEW, do_sample=False)
        new = out[:, batch["input_ids"].shape[1] :]
        ended = (new == tokenizer.eos_token_id).int()
        generated += int((ended.cumsum(1) - ended == 0).sum())
    return generated, time.monotonic() - started


async def with_elastic_ep(url: str, questions: list[str]) -> tuple[int, float]:
    gate = asyncio.Semaphore(CONCURRENT)

    async def one(session: aiohttp.ClientSession, question: str) -> int:
        body = {"model": "default", "messages": [{"role": "user", "content": question}], "temperature": 0.0}
        async with (
            gate,
            session.post(f"{url}/v1/chat/completions", json={**body, "max_tokens": MAX_NEW}) as response,
        ):
            usage = (await response.json())["usage"]
            return int(usage["completion_tokens"])

    async with http() as session:
        started = time.monotonic()
        counts = await asyncio.gather(*(one(session, question) for question in questions))
        return sum(counts), time.monotonic() - started


def main() -> None:
    parser = command_line(__doc__, "throughput", ranks=8)
    parser.add_argument("--problems", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    questions = [problem.question for problem in held_out(options.problems)]
    ours, theirs, theirs_sorted = [], [], []
    for _ in range(options.rounds):
        with tempfile.TemporaryDirectory(prefix="throughput-") as scratch:
            with server(["--ranks", str(options.ranks)], Path(scratch)) as target:
                asyncio.run(with_elastic_ep(target.url, questions[:CONCURRENT]))
                tokens, seconds = asyncio.run(with_elastic_ep(target.url, questions))
            ours.append(tokens / seconds)
        tokens, seconds = with_transformers(questions)
        theirs.append(tokens / seconds)
        tokens, seconds = with_transformers(sorted(questions, key=len))
        theirs_sorted.append(tokens / seconds)
        print(
            f"elastic_ep {ours[-1]:.0f}, transformers {theirs[-1]:.0f} (sorted {theirs_sorted[-1]:.0f}) tokens/s"
        )
    best = max(percentile(theirs, 0.5), percentile(theirs_sorted, 0.5))
    write_result(
        options.out,
        {
            "concurrent": CONCURRENT,
            "problems": options.problems,
            "elastic_ep_tokens_per_s": [round(value, 1) for value in ours],
            "transformers_tokens_per_s": [round(value, 1) for value in theirs],
            "transformers_sorted_tokens_per_s": [round(value, 1) for value in theirs_sorted],
            "ratio_of_medians": round(percentile(ours, 0.5) / best, 3),
        },
    )


if __name__ == "__main__":
    main()
