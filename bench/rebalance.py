"""Rebalance experts under load: how long the steps get while copies are on their way, beside those before.

    python -m bench.rebalance [--out bench/results/rebalance.json]

Every round starts a server afresh, because a second plan for the same load has nothing left to move. Step lengths come
from the log: what the forward threads say of each step that gave tokens. Two models: the bundled one, and random weights
with experts of 6 MiB.
"""

from __future__ import annotations

import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.kit.served import Server, http, percentile, server, write_result

from bench.kit.command_line import command_line
from bench.kit.large_model import write_model
from bench.kit.load import under_load

CONCURRENT = 32
WARM_UP_S, WINDOW_S = 8.0, 3.0


async def rebalance(target: Server) -> tuple[dict[str, Any], tuple[int, int, int]]:
    """The answer, and when: the window before began, the request was sent, the answer came."""
    async with http() as session, under_load(session, target, streams=CONCURRENT, problems=256):
        try:
            while True:
                await asyncio.sleep(WARM_UP_S)
                quiet = time.monotonic_ns()
                await asyncio.sleep(WINDOW_S)
                asked = time.monotonic_ns()
                async with session.post(f"{target.url}/rebalance") as response:
                    answer = await response.json()
                ended = time.monotonic_ns()
                if answer["planned"]:
                    return answer, (quiet, asked, ended)
        finally:
            await asyncio.sleep(1.0)


def steps(events: Path) -> list[tuple[int, float]]:
    """When each step of each rank ended, and how many milliseconds it took."""
    found = []
    for text in events.read_text().splitlines():
        line = json.loads(text)
        if line.get("machine") == "routing" and line["heard"][0] == "TokensCommitted":
            _, _, _, _, started, ended = line["heard"]
            found.append((ended, (ended - started) / 1e6))
    return found


def copies_between(events: Path, began: int, ended: int) -> list[int]:
    lines = (json.loads(text) for text in events.read_text().splitlines())
    return [
        line["t_ns"]
        for line in lines
        if line.get("machine") == "repair" and line["heard"][0] == "Copied" and began <= line["t_ns"] <= ended
    ]


def one_round(arguments: list[str]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(prefix="rebalance-") as scratch:
        with server(["--ranks", "8", "--enable-eplb", *arguments], Path(scratch)) as target:
            answer, (quiet, asked, ended) = asyncio.run(rebalance(target))
        lengths = steps(target.events)
        copied = copies_between(target.events, asked, ended)
    before = [took for at, took in lengths if quiet <= at < asked]
    during = [took for at, took in lengths if copied[0] - 50_000_000 <= at <= copied[-1] + 50_000_000]
    median = statistics.median(before)
    return {
        **answer,
        "answered_s": round((ended - asked) / 1e9, 3),
        "copying_s": round((copied[-1] - copied[0]) / 1e9, 3),
        "median_step_ms": {"before": round(median, 2), "during": round(statistics.median(during), 2)},
        "median_steps": {
            "before": {
                "p99": round(percentile(before, 0.99) / median, 2),
                "max": round(max(before) / median, 2),
            },
            "during": {
                "p99": round(percentile(during, 0.99) / median, 2),
                "max": round(max(during) / median, 2),
            },
        },
    }


def main() -> None:
    parser = command_line(__doc__, "rebalance")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    result: dict[str, Any] = {"bundled": [], "experts_of_6_MiB": []}
    for _ in range(options.rounds):
        result["bundled"].append(one_round([]))
        print(result["bundled"][-1], flush=True)
    with tempfile.TemporaryDirectory(prefix="rebalance-") as scratch:
        model = write_model(Path(scratch))
        arguments = ["--model", str(model), "--load-format", "dummy"]
        for _ in range(2):
            result["experts_of_6_MiB"].append(one_round(arguments))
            print(result["experts_of_6_MiB"][-1], flush=True)
    write_result(options.out, result)


if __name__ == "__main__":
    main()
