"""What elasticity costs while nothing fails: throughput with the machinery on against off, side by side.

    python -m bench.overhead [--rounds 12] [--seconds 10] [--out bench/results/overhead.json]

Two servers run at once, one of them with `--disable-fault-tolerance` (no death watch, heartbeats, hang detection,
observation of steps, event log). The same 64 streams load one and then the other, in pairs whose order alternates; the
idle one is parked. Counted are tokens a second, and the processor time that server and ranks take per token, which the
rest of the machine disturbs less.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from bench.common import Server, http, percentile, server, write_result
from elastic_ep.problems import held_out

CONCURRENT = 64
MAX_NEW = 160


@dataclass(frozen=True)
class Sample:
    tokens_per_s: float
    cpu_us_per_token: float


def cpu_seconds(root: psutil.Process) -> float:
    total = 0.0
    for process in [root, *root.children(recursive=True)]:
        times = process.cpu_times()
        total += times.user + times.system
    return total


async def load(target: Server, questions: list[str], seconds: float) -> Sample:
    """Keep `CONCURRENT` requests going for that long; requests begun later than that do not count."""
    root = psutil.Process(target.process.pid)
    numbers = count()
    tokens = 0

    async def stream(session: aiohttp.ClientSession, end: float) -> None:
        nonlocal tokens
        while time.monotonic() < end:
            question = questions[next(numbers) % len(questions)]
            body = {
                "model": "default",
                "messages": [{"role": "user", "content": question}],
                "temperature": 0.0,
                "max_tokens": MAX_NEW,
            }
            async with session.post(f"{target.url}/v1/chat/completions", json=body) as response:
                tokens += int((await response.json())["usage"]["completion_tokens"])

    async with http() as session:
        before, started = cpu_seconds(root), time.monotonic()
        await asyncio.gather(*(stream(session, started + seconds) for _ in range(CONCURRENT)))
        elapsed = time.monotonic() - started
        spent = cpu_seconds(root) - before
    return Sample(tokens / elapsed, spent / tokens * 1e6)


def compare(rounds: int, seconds: float, ranks: int) -> list[dict[str, Sample]]:
    questions = [problem.question for problem in held_out(512)]
    pairs = []
    with (
        tempfile.TemporaryDirectory(prefix="overhead-") as scratch,
        server(["--ranks", str(ranks)], Path(scratch) / "on") as on,
        server(["--ranks", str(ranks), "--disable-fault-tolerance"], Path(scratch) / "off") as off,
    ):
        targets = {"on": on, "off": off}
        for target in targets.values():
            asyncio.run(load(target, questions, 3.0))
        for number in range(rounds):
            order = ("on", "off") if number % 2 == 0 else ("off", "on")
            pair = {name: asyncio.run(load(targets[name], questions, seconds)) for name in order}
            pairs.append(pair)
            print(
                f"round {number + 1}/{rounds}: "
                + ", ".join(
                    f"{name} {pair[name].tokens_per_s:.0f} tokens/s {pair[name].cpu_us_per_token:.0f} us/token"
                    for name in ("on", "off")
                ),
                flush=True,
            )
    return pairs


def summarise(pairs: list[dict[str, Sample]]) -> dict[str, Any]:
    slower = [1 - pair["on"].tokens_per_s / pair["off"].tokens_per_s for pair in pairs]
    dearer = [pair["on"].cpu_us_per_token / pair["off"].cpu_us_per_token - 1 for pair in pairs]

    def median_of(name: str, field: str) -> float:
        return round(percentile([getattr(pair[name], field) for pair in pairs], 0.5), 1)

    return {
        "concurrent": CONCURRENT,
        "rounds": len(pairs),
        "median": {
            name: {field: median_of(name, field) for field in ("tokens_per_s", "cpu_us_per_token")}
            for name in ("on", "off")
        },
        "throughput_lost_percent": {
            "median": round(percentile(slower, 0.5) * 100, 2),
            "quartiles": [round(percentile(slower, share) * 100, 2) for share in (0.25, 0.75)],
        },
        "cpu_per_token_added_percent": {
            "median": round(percentile(dearer, 0.5) * 100, 2),
            "quartiles": [round(percentile(dearer, share) * 100, 2) for share in (0.25, 0.75)],
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--out", type=Path, default=Path("bench/results/overhead.json"))
    options = parser.parse_args()
    result = summarise(compare(options.rounds, options.seconds, options.ranks))
    lost, added = result["throughput_lost_percent"], result["cpu_per_token_added_percent"]
    print(f"throughput lost {lost['median']} % (quartiles {lost['quartiles']})")
    print(f"processor time added {added['median']} % (quartiles {added['quartiles']})")
    write_result(options.out, result)


if __name__ == "__main__":
    main()
