"""Full load beside many busy processes: is a rank that is well ever fenced, and is one that hangs still found?

    python -m bench.busy [--minutes 10] [--busy 16] [--out bench/results/busy.json]

64 streams without a pause on eight ranks, and other processes that want a processor all the time. Counted are fences of
healthy ranks and failed requests (there must be none of either), and tokens. At the end one rank is stopped (SIGSTOP),
and it is timed until it is fenced.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import cycle, pairwise
from pathlib import Path
from typing import Any

import aiohttp
from tests.kit.bound import Bound
from tests.kit.served import Server, chat, http, server, status, summary, until_full, write_result
from train.problems import held_out

from bench.kit.command_line import command_line
from bench.kit.load import generated

LOOK_EVERY_S = 15.0
FOUND_WITHIN_S = 60.0
BUSY = "while True: pass"


@dataclass
class Load:
    """What clients saw. `gaps` are the longest pauses of each answer, seconds."""

    answers: int = 0
    failures: list[str] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)

    async def stream(
        self, session: aiohttp.ClientSession, url: str, first: int, questions: list[str]
    ) -> None:
        for question in cycle(questions[first:] + questions[:first]):
            stamps = [time.monotonic()]
            try:
                await chat(session, url, question, stamps=stamps)
            except (RuntimeError, OSError, aiohttp.ClientError) as error:
                self.failures.append(f"{type(error).__name__}: {error}")
                await asyncio.sleep(1.0)
                continue
            self.answers += 1
            self.gaps.append(max(later - one for one, later in pairwise(stamps)))


@contextmanager
def busy_processes(count: int) -> Iterator[None]:
    processes = [Bound([sys.executable, "-c", BUSY]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


async def losses(session: aiohttp.ClientSession, target: Server) -> list[str]:
    """Of each rank that was ever lost, how often, and why the last time."""
    engines = (await status(session, target.url))["engines"]
    return [
        f"rank {engine['id']}, {engine['incarnation'] - 1} times, at last: {engine['last_loss']['why']}"
        for engine in engines
        if engine["last_loss"] is not None
    ]


async def time_a_hang(session: aiohttp.ClientSession, target: Server) -> float | None:
    """Seconds from SIGSTOP to the end of the incarnation, None if it was not found."""
    engine = (await status(session, target.url))["engines"][-1]
    os.kill(engine["pid"], signal.SIGSTOP)
    began = time.monotonic()
    while time.monotonic() - began < FOUND_WITHIN_S:
        now = (await status(session, target.url))["engines"][-1]
        if now["incarnation"] != engine["incarnation"] or now["status"] == "dead":
            return round(time.monotonic() - began, 3)
        await asyncio.sleep(0.02)
    return None


async def measure(target: Server, minutes: float, streams: int, busy: int) -> dict[str, Any]:
    questions = [problem.question for problem in held_out(512)]
    load = Load()
    async with http() as session, asyncio.TaskGroup() as tasks:
        await until_full(session, target.url)
        running = [tasks.create_task(load.stream(session, target.url, n, questions)) for n in range(streams)]
        with busy_processes(busy):
            began = time.monotonic()
            while (elapsed := time.monotonic() - began) < minutes * 60:
                await asyncio.sleep(min(LOOK_EVERY_S, minutes * 60 - elapsed))
                tokens, lost = await generated(session, target.url), await losses(session, target)
                said = f"{tokens:.0f} tokens, {load.answers} answers, load {os.getloadavg()[0]:.1f}"
                print(f"{elapsed:6.0f} s, {said}, losses {lost}", flush=True)
            hang_s = await time_a_hang(session, target)
            if hang_s is not None and not await losses(session, target):
                raise RuntimeError("a rank was fenced and the status does not tell of it")
        for task in running:
            task.cancel()
    return {
        "minutes": round(elapsed / 60, 2),
        "busy_processes": busy,
        "healthy_ranks_lost": len(lost),
        "losses": lost,
        "tokens": tokens,
        "answers": load.answers,
        "requests_failed": len(load.failures),
        "failures": load.failures[:10],
        "longest_gap_of_an_answer_s": summary(load.gaps),
        "a_real_hang_found_after_s": hang_s,
    }


def main() -> None:
    parser = command_line(__doc__, "busy", ranks=8)
    parser.add_argument("--busy", type=int, default=16, help="processes that want a processor all the time")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--minutes", type=float, default=10.0)
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="busy-") as scratch,
        server(["--ranks", str(options.ranks)], Path(scratch)) as target,
    ):
        result = asyncio.run(measure(target, options.minutes, options.streams, options.busy))
    print(json.dumps(result, indent=1))
    write_result(options.out, {"ranks": options.ranks, "streams": options.streams, **result})


if __name__ == "__main__":
    main()
