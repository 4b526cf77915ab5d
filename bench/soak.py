"""Full load for a long time with nothing killed: is a busy but healthy rank ever fenced?

    python -m bench.soak [--minutes 30] [--out bench/results/soak.json]

64 streams without a pause on all cores. Counted are losses of ranks (there must be none), failed requests, and memory at
the beginning and at the end.
"""

from __future__ import annotations

import asyncio
import os
import tempfile
import time
from pathlib import Path
from typing import Any

from tests.kit.served import Server, http, server, status, write_result

from bench.kit.command_line import command_line
from bench.kit.load import generated, pss_mb, under_load

SETTLE_S = 20.0
LOOK_EVERY_S = 30.0


async def soak(target: Server, minutes: float) -> dict[str, Any]:
    loads: list[float] = []
    async with http() as session, under_load(session, target):
        await asyncio.sleep(SETTLE_S)
        first_pss, started = pss_mb(target), time.monotonic()
        while (elapsed := time.monotonic() - started) < minutes * 60:
            await asyncio.sleep(LOOK_EVERY_S)
            loads.append(os.getloadavg()[0])
            tokens = await generated(session, target.url)
            print(f"{elapsed / 60:5.1f} min, {tokens:.0f} tokens, load {loads[-1]:.1f}", flush=True)
        found = await status(session, target.url)
        last_pss = pss_mb(target)
    incarnations = [engine["incarnation"] for engine in found["engines"]]
    return {
        "minutes": round(elapsed / 60, 1),
        "ranks_lost": sum(incarnations) - len(incarnations),
        "epoch": found["epoch"],
        "tokens": tokens,
        "failed_requests": 0,  # one that fails ends the run with its error
        "pss_mb": {"begin": first_pss, "end": last_pss},
        "load_average": {"least": round(min(loads), 1), "most": round(max(loads), 1)},
        "log_mb": round(target.events.stat().st_size / 1e6, 1),
    }


def main() -> None:
    parser = command_line(__doc__, "soak", ranks=8)
    parser.add_argument("--minutes", type=float, default=30.0)
    options = parser.parse_args()
    with (
        tempfile.TemporaryDirectory(prefix="soak-") as scratch,
        server(["--ranks", str(options.ranks)], Path(scratch)) as target,
    ):
        result = asyncio.run(soak(target, options.minutes))
    print(result)
    write_result(options.out, result)


if __name__ == "__main__":
    main()
