"""Start, memory and idleness of a server with eight ranks and the bundled model.

    python -m bench.footprint [--starts 5] [--idle-seconds 60] [--out bench/results/footprint.json]

Start is from the command to the line that says it serves (all ranks Serving). Memory is the sum of PSS over the run
process, ranks and all helpers, right after start and under 64 streams. Idle is the processor time of all of them
together, as a share of one core, while nobody asks anything.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
from tests.kit.served import Server, http, server, summary, write_result

from bench.kit.command_line import command_line
from bench.kit.load import cpu_seconds, pss_mb, under_load

SETTLE_S = 5.0
LOAD_S = 15.0


def idle_percent(target: Server, seconds: float) -> float:
    root = psutil.Process(target.process.pid)
    (before, _), started = cpu_seconds(root), time.monotonic()
    time.sleep(seconds)
    (after, _), elapsed = cpu_seconds(root), time.monotonic() - started
    return round((after - before) / elapsed * 100, 2)


async def pss_under_load(target: Server) -> float:
    async with http() as session, under_load(session, target):
        await asyncio.sleep(LOAD_S)
        return pss_mb(target)


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
    parser = command_line(__doc__, "footprint", ranks=8)
    parser.add_argument("--starts", type=int, default=5)
    parser.add_argument("--idle-seconds", type=float, default=60.0)
    options = parser.parse_args()
    result = measure(options.starts, options.idle_seconds, options.ranks)
    for name, value in result.items():
        print(f"{name:24s} {value}")
    write_result(options.out, result)


if __name__ == "__main__":
    main()
