"""Start, memory and idleness of a server with eight ranks and the bundled model.

    python -m bench.footprint [--starts 5] [--idle-seconds 60] [--out bench/results/footprint.json]

Start is from the command to the line that says it serves (all ranks Serving). Memory is the sum of PSS over the run
process, ranks and all helpers, right after start and under 64 streams. Idle is the processor time of all of them
together, as a share of one core, while nobody asks anything.
"""

from __future__ import annotations

import argparse
import asyncio
import tempfile
import time
from itertools import cycle
from pathlib import Path
from typing import Any

import psutil
from tests.kit.served import Server, http, server, summary, write_result
from train.problems import held_out

from bench.overhead import CONCURRENT, cpu_seconds, stream

SETTLE_S = 5.0
LOAD_S = 15.0


def pss_mb(target: Server) -> float:
    root = psutil.Process(target.process.pid)
    family = [root, *root.children(recursive=True)]
    return round(sum(process.memory_full_info().pss for process in family) / 1e6, 1)


def idle_percent(target: Server, seconds: float) -> float:
    root = psutil.Process(target.process.pid)
    (before, _), started = cpu_seconds(root), time.monotonic()
    time.sleep(seconds)
    (after, _), elapsed = cpu_seconds(root), time.monotonic() - started
    return round((after - before) / elapsed * 100, 2)


async def pss_under_load(target: Server) -> float:
    questions = [problem.question for problem in held_out(512)]
    async with http() as session, asyncio.TaskGroup() as tasks:
        streams = [
            tasks.create_task(stream(session, target.url, cycle(questions[first:] + questions[:first])))
            for first in range(CONCURRENT)
        ]
        await asyncio.sleep(LOAD_S)
        found = pss_mb(target)
        for task in streams:
            task.cancel()
    return found


def measure(starts: int, idle_seconds: float, ranks: int) -> dict[str, Any]:
    ready: list[float] = []
    result: dict[str, Any] = {"ranks": ranks}
    for number in range(starts):
        with (
            tempfile.TemporaryDirectory(prefix="footprint-") as scratch,
            server(["--ranks", str(ranks)], Path(scratch)) as target,
        ):
            ready.append(target.ready_s)
            if number == 0:
                result["pss_mb_at_start"] = pss_mb(target)
                result["pss_mb_under_load"] = asyncio.run(pss_under_load(target))
                time.sleep(SETTLE_S)
                result["idle_percent_of_a_core"] = idle_percent(target, idle_seconds)
    return {"start_s": summary(ready), **result}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--idle-seconds", type=float, default=60.0)
    parser.add_argument("--out", type=Path, default=Path("bench/results/footprint.json"))
    options = parser.parse_args()
    result = measure(options.starts, options.idle_seconds, options.ranks)
    for name, value in result.items():
        print(f"{name:24s} {value}")
    write_result(options.out, result)


if __name__ == "__main__":
    main()
