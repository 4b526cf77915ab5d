"""Generated tokens a second at 64 concurrent requests, against `transformers` on the same model and cores.

    python -m bench.throughput [--old TREE] [--out bench/results/throughput.json]

All sides get the same prompts and stop where the model stops, in turns, in one run. `--old` is a source tree of another
commit. transformers runs one batch of 64 at a time with its key-value cache, all cores, float32, left padding; its best
of two batchings counts: in the order given, and sorted by length (which a server could not do).

The processor time of each side is counted too, which other work on the machine disturbs less. For that transformers runs
with one thread as well, since several wait for each other in a loop.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import torch
from tests.kit.served import http, percentile, write_result
from train.problems import held_out

from bench.kit.command_line import command_line, source_tree
from bench.kit.load import cpu_seconds
from bench.kit.sides import Side, side
from elastic_ep.run import BUNDLED_MODEL

CONCURRENT = 64
MAX_NEW = 160


@dataclass(frozen=True)
class Sample:
    tokens_per_s: float
    cpu_us_per_token: float
    """Of all processes of a server."""


def with_transformers(questions: list[str]) -> Sample:
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
    generated, spent = 0, time.process_time()
    model.generate(**tokenizer(texts[:2], return_tensors="pt", padding=True), max_new_tokens=4)
    started = time.monotonic()
    for first in range(0, len(texts), CONCURRENT):
        batch = tokenizer(texts[first : first + CONCURRENT], return_tensors="pt", padding=True)
        with torch.inference_mode():
            out = model.generate(**batch, max_new_tokens=MAX_NEW, do_sample=False)
        new = out[:, batch["input_ids"].shape[1] :]
        ended = (new == tokenizer.eos_token_id).int()
        generated += int((ended.cumsum(1) - ended == 0).sum())
    seconds = time.monotonic() - started
    return Sample(generated / seconds, (time.process_time() - spent) / generated * 1e6)


def serve(side: Side, questions: list[str]) -> Sample:
    with tempfile.TemporaryDirectory(prefix="throughput-") as scratch, side.server(Path(scratch)) as target:
        asyncio.run(with_elastic_ep(target.url, questions[:CONCURRENT]))
        root = psutil.Process(target.process.pid)
        spent = cpu_seconds(root)[0]
        tokens, seconds = asyncio.run(with_elastic_ep(target.url, questions))
        return Sample(tokens / seconds, (cpu_seconds(root)[0] - spent) / tokens * 1e6)


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
    parser.add_argument(
        "--old", type=source_tree, help="a source tree of another commit, measured beside this one"
    )
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    questions = [problem.question for problem in held_out(options.problems)]
    arguments = ["--ranks", str(options.ranks)]
    sides = [side("new", arguments)] + ([side("old", arguments, options.old)] if options.old else [])
    ours: dict[str, list[Sample]] = {one.name: [] for one in sides}
    theirs: list[float] = []
    theirs_sorted: list[float] = []
    one_thread: list[Sample] = []
    load: list[float] = []
    for _ in range(options.rounds):
        load.append(os.getloadavg()[0])
        for one in sides:
            ours[one.name].append(serve(one, questions))
            print(f"{one.name}: {ours[one.name][-1]}", flush=True)
        by_length = sorted(questions, key=len)
        for order, rates in ((questions, theirs), (by_length, theirs_sorted)):
            rates.append(with_transformers(order).tokens_per_s)
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        one_thread.append(with_transformers(by_length))
        torch.set_num_threads(threads)
        print(f"transformers {theirs[-1]:.0f} (sorted {theirs_sorted[-1]:.0f}) tokens/s", flush=True)
    best = max(percentile(theirs, 0.5), percentile(theirs_sorted, 0.5))
    medians = {name: percentile([s.tokens_per_s for s in samples], 0.5) for name, samples in ours.items()}
    write_result(
        options.out,
        {
            "concurrent": CONCURRENT,
            "problems": options.problems,
            "load_average_before": load,
            "sides": {one.name: one.described() for one in sides},
            **{name: [asdict(sample) for sample in samples] for name, samples in ours.items()},
            "step_ms": {name: round(CONCURRENT / median * 1000, 2) for name, median in medians.items()},
            "transformers_tokens_per_s": [round(value, 1) for value in theirs],
            "transformers_sorted_tokens_per_s": [round(value, 1) for value in theirs_sorted],
            "transformers_one_thread_sorted": [asdict(sample) for sample in one_thread],
            "ratio_of_medians": {name: round(median / best, 3) for name, median in medians.items()},
        },
    )


if __name__ == "__main__":
    main()
