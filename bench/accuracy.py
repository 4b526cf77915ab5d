"""Accuracy through the HTTP endpoint: before, with one rank down, and after its return; compared one by one.

    python -m bench.accuracy [--problems 500] [--out bench/results/accuracy.json]

The rank that is down stays down during its pass: it is stopped by SIGKILL again whenever it comes back.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import tempfile
from contextlib import suppress
from pathlib import Path

import aiohttp
from tests.kit.served import chat, http, server, status, until_full, write_result
from train.problems import Problem, held_out

from bench.kit.command_line import command_line

CONCURRENT = 64


async def answers(session: aiohttp.ClientSession, url: str, problems: list[Problem]) -> list[str]:
    gate = asyncio.Semaphore(CONCURRENT)

    async def one(problem: Problem) -> str:
        async with gate:
            return await chat(session, url, problem.question, temperature=0.0, max_tokens=160)

    return await asyncio.gather(*(one(problem) for problem in problems))


async def keep_down(session: aiohttp.ClientSession, url: str, rank: int) -> None:
    """Kill every incarnation of this rank as soon as it has a process."""
    while True:
        engine = (await status(session, url))["engines"][rank]
        if engine["pid"] and engine["state"] != "Failed":
            with suppress(ProcessLookupError):
                os.kill(engine["pid"], signal.SIGKILL)
        await asyncio.sleep(0.1)


def share_right(texts: list[str], problems: list[Problem]) -> float:
    right = 0
    for text, problem in zip(texts, problems, strict=True):
        found = re.findall(r"#### (-?\d+)", text)
        right += bool(found) and int(found[-1]) == problem.answer
    return right / len(problems)


async def measure(url: str, problems: list[Problem], rank: int) -> dict[str, list[str]]:
    async with http() as session:
        before = await answers(session, url, problems)
        keeper = asyncio.create_task(keep_down(session, url, rank))
        await asyncio.sleep(0.5)
        down = await answers(session, url, problems)
        keeper.cancel()
        await until_full(session, url)
        after = await answers(session, url, problems)
    return {"before": before, "one_rank_down": down, "after_its_return": after}


def main() -> None:
    parser = command_line(__doc__, "accuracy", ranks=8)
    parser.add_argument("--rank-down", type=int, default=3)
    parser.add_argument("--problems", type=int, default=500)
    options = parser.parse_args()
    problems = held_out(options.problems)
    arguments = ["--ranks", str(options.ranks), "--relaunch-limit", "1000000"]
    with (
        tempfile.TemporaryDirectory(prefix="accuracy-") as scratch,
        server(arguments, Path(scratch)) as target,
    ):
        passes = asyncio.run(measure(target.url, problems, options.rank_down))
    result = {
        "problems": len(problems),
        "rank_down": options.rank_down,
        "accuracy": {name: share_right(texts, problems) for name, texts in passes.items()},
        "answers_that_differ_from_before": {
            name: sum(a != b for a, b in zip(texts, passes["before"], strict=True))
            for name, texts in passes.items()
        },
    }
    write_result(options.out, result)
    print(result["accuracy"], result["answers_that_differ_from_before"])


if __name__ == "__main__":
    main()
