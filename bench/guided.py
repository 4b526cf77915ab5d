"""Text that follows a grammar, and calls of tools, while ranks are killed, and what guiding costs.

    python -m bench.guided [--streams 200] [--kills 12] [--turns 5] [--tokens 96] [--out bench/results/guided.json]

First 64 streams of as many tokens each, guided and free in turns, on one server: tokens a second, and processor time of
all its processes for a token. Then every request once, undisturbed, and once more while `--kills` ranks are killed one
after the other, each after its share of the answers: is every answer valid, and the one from before?
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from tests.kit.guided_asks import GuidedAsk, guided_and_calls, person
from tests.kit.served import TOOL_TEMPLATE, Server, chat, counters, http, server, until_full, write_result
from train.problems import held_out

from bench.kit.command_line import command_line
from bench.kit.kills import Case, strike
from bench.kit.load import cpu_seconds
from bench.kit.sections import gpu, quartiles
from bench.kit.sides import add_model_options, server_arguments

AT_ONCE = 64
NEXT_KILL_S = 120.0
"""It waits for its share of the answers so long at most."""
TOOLS = ["--chat-template", str(TOOL_TEMPLATE), "--tool-call-parser", "hermes"]


@dataclass
class Answers:
    """To each request."""

    url: str
    asks: list[GuidedAsk]
    texts: dict[int, str] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)

    async def run(self, session: aiohttp.ClientSession) -> None:
        questions = [problem.question for problem in held_out(len(self.asks))]
        numbers = iter(range(len(self.asks)))

        async def work() -> None:
            for number in numbers:
                fields = self.asks[number].fields
                try:
                    self.texts[number] = await chat(session, self.url, questions[number], **fields)
                except (RuntimeError, aiohttp.ClientError, TimeoutError) as error:
                    self.errors.append(f"{number}: {error!r}")

        async with asyncio.TaskGroup() as tasks:
            for _ in range(AT_ONCE):
                tasks.create_task(work())


async def kills(target: Server, asks: list[GuidedAsk], count: int, ranks: int) -> dict[str, Any]:
    before = Answers(target.url, asks)
    during = Answers(target.url, asks)
    async with http() as session:
        await before.run(session)
        replayed = (await counters(session, target.url))["requests_replayed"]
        running = asyncio.create_task(during.run(session))
        victims = random.Random(1)
        for number in range(count):
            async with asyncio.timeout(NEXT_KILL_S):
                while len(during.texts) < (number + 1) * len(asks) // (count + 1):
                    await asyncio.sleep(0.02)
            struck = await strike(session, target.url, Case((victims.randrange(ranks),)))
            beyond = {one["rank"]: one["incarnation"] for one in struck["sent"]}
            await until_full(session, target.url, beyond=beyond)
            print(f"\r{number + 1} kills, {len(during.texts)} answers, {len(during.errors)} errors ", end="")
        await running
        print()
        replayed = (await counters(session, target.url))["requests_replayed"] - replayed

    def valid(answers: Answers) -> int:
        return sum(asks[number].valid(text) for number, text in answers.texts.items())

    return {
        "requests": len(asks),
        "kills": count,
        "streams_that_lost_their_rank": replayed,
        "errors": (before.errors + during.errors)[:10],
        "valid": valid(during),
        "identical": sum(text == before.texts.get(number) for number, text in during.texts.items()),
        "valid_undisturbed": valid(before),
    }


def endless(index: int) -> dict[str, Any]:
    """Guided, and not done before 2,000 tokens."""
    schema = {"type": "array", "items": person(index), "minItems": 50}
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}}


async def speeds(target: Server, turns: int, length: int) -> dict[str, Any]:
    """One turn of each before those that count."""
    seen: dict[str, list[float]] = {"guided": [], "free": []}
    cpu: dict[str, list[float]] = {"guided": [], "free": []}
    root = psutil.Process(target.process.pid)
    async with http() as session:
        for turn in range(turns + 1):
            for kind in ("guided", "free") if turn % 2 else ("free", "guided"):
                before, _ = cpu_seconds(root)
                rate = await speed(session, target.url, length, guided=kind == "guided")
                after, _ = cpu_seconds(root)
                if turn:
                    seen[kind].append(rate)
                    cpu[kind].append(1000 * (after - before) / (AT_ONCE * length))
    ratios = [guided / free for guided, free in zip(seen["guided"], seen["free"], strict=True)]
    processor = [free / guided for guided, free in zip(cpu["guided"], cpu["free"], strict=True)]
    return {
        "streams": AT_ONCE,
        "tokens_each": length,
        "guided_tokens_per_s": quartiles(seen["guided"], 0),
        "free_tokens_per_s": quartiles(seen["free"], 0),
        "guided_of_free": quartiles(ratios),
        "guided_processor_ms_a_token": quartiles(cpu["guided"]),
        "free_processor_ms_a_token": quartiles(cpu["free"]),
        "guided_of_free_by_processor_time": quartiles(processor),
    }


async def speed(session: aiohttp.ClientSession, url: str, length: int, *, guided: bool) -> float:
    """Tokens a second of `AT_ONCE` streams of so many, sampled alike."""
    questions = [problem.question for problem in held_out(AT_ONCE)]

    async def one(number: int) -> int:
        fields = endless(number % 8) if guided else {"ignore_eos": True}
        messages = [{"role": "user", "content": questions[number]}]
        how = {"model": "default", "max_tokens": length, "temperature": 1.0, "seed": number}
        body: dict[str, Any] = {"messages": messages, **how, **fields}
        async with session.post(f"{url}/v1/chat/completions", json=body) as response:
            answer = await response.json()
            if response.status != 200:
                raise RuntimeError(answer)
        tokens: int = answer["usage"]["completion_tokens"]
        return tokens

    began = time.monotonic()
    tokens = await asyncio.gather(*(one(number) for number in range(AT_ONCE)))
    assert set(tokens) == {length}, "all are as long"
    return sum(tokens) / (time.monotonic() - began)


async def measure(target: Server, options: argparse.Namespace) -> dict[str, Any]:
    async with http() as session:
        await until_full(session, target.url)
    result: dict[str, Any] = {}
    if options.turns:
        result["cost"] = await speeds(target, options.turns, options.tokens)
    if options.kills:
        asks = guided_and_calls(options.streams)
        result["kills"] = await kills(target, asks, options.kills, options.ranks)
    return result


def main() -> None:
    parser = command_line(__doc__, "guided", ranks=8)
    add_model_options(parser, "cpu")
    parser.add_argument("--streams", type=int, default=200, help="different requests (default: %(default)s)")
    parser.add_argument("--kills", type=int, default=12, help="(default: %(default)s)")
    parser.add_argument("--turns", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument(
        "--tokens", type=int, default=96, help="of each stream whose speed is measured (default: %(default)s)"
    )
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="guided-") as name:
        scratch = Path(name)
        with server([*TOOLS, *server_arguments(options, scratch)], scratch / "runs") as target:
            result = asyncio.run(measure(target, options))
    print(json.dumps(result, indent=1))
    machine = {"gpu": gpu()} if options.device == "cuda" else {}
    write_result(options.out, {**machine, "ranks": options.ranks, **result})


if __name__ == "__main__":
    main()
