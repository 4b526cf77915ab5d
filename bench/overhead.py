"""What elasticity costs while nothing fails: throughput with the machinery on against off, side by side.

    python -m bench.overhead [--rounds 30] [--seconds 10] [--out bench/results/overhead.json]

Two servers run at once, one of them with `--disable-fault-tolerance` (no death watch, heartbeats, hang detection,
observation of steps, event log). Each gets 64 streams, at the same time, so that whatever else the machine
does disturbs both alike. Counted are the tokens a second of each, and the processor time per token: in all, and of all
threads but the ranks' forward threads. The forward threads do the same work on both sides, but what it costs them varies
from round to round by 10 % (caches, prompts that come together); the machinery runs on the other threads, and those
can be compared.
"""

from __future__ import annotations

import asyncio
import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from tests.kit.served import Server, http, percentile, server, write_result

from bench.kit.command_line import command_line
from bench.kit.load import cpu_seconds, generated, under_load

CONCURRENT = 64
MAX_NEW = 160
FIELDS = ("tokens_per_s", "cpu_us_per_token", "control_us_per_token")
WARM_UP_S = 5.0
_GENERATED = re.compile(r"^elastic_ep:generation_tokens_total(?:\{.*\})? (\S+)", re.MULTILINE)


@dataclass(frozen=True)
class Sample:
    tokens_per_s: float
    cpu_us_per_token: float
    control_us_per_token: float
    """Of it, what the forward threads did not take."""


async def sample(session: aiohttp.ClientSession, target: Server, seconds: float) -> Sample:
    """What the server does in that time, in the midst of its load."""
    root = psutil.Process(target.process.pid)
    tokens, spent, started = await generated(session, target.url), cpu_seconds(root), time.monotonic()
    await asyncio.sleep(seconds)
    tokens = await generated(session, target.url) - tokens
    total, control = (now - then for now, then in zip(cpu_seconds(root), spent, strict=True))
    return Sample(tokens / (time.monotonic() - started), total / tokens * 1e6, control / tokens * 1e6)


async def compare(on: Server, off: Server, rounds: int, seconds: float) -> list[dict[str, Sample]]:
    pairs = []
    async with http() as session, under_load(session, on, off):
        await asyncio.sleep(WARM_UP_S)
        for number in range(rounds):
            samples = await asyncio.gather(*(sample(session, target, seconds) for target in (on, off)))
            pair = dict(zip(("on", "off"), samples, strict=True))
            pairs.append(pair)
            told = [
                f"{n} {s.tokens_per_s:.0f} tokens/s {s.cpu_us_per_token:.0f} us/token "
                f"({s.control_us_per_token:.1f} control)"
                for n, s in pair.items()
            ]
            print(f"round {number + 1}/{rounds}: {', '.join(told)}", flush=True)
    return pairs


def summarise(pairs: list[dict[str, Sample]]) -> dict[str, Any]:
    slower = [1 - pair["on"].tokens_per_s / pair["off"].tokens_per_s for pair in pairs]
    dearer = [pair["on"].cpu_us_per_token / pair["off"].cpu_us_per_token - 1 for pair in pairs]

    extra = [
        (pair["on"].control_us_per_token - pair["off"].control_us_per_token) / pair["off"].cpu_us_per_token
        for pair in pairs
    ]

    def median_of(name: str, field: str) -> float:
        return round(percentile([getattr(pair[name], field) for pair in pairs], 0.5), 1)

    return {
        "concurrent": CONCURRENT,
        "rounds": len(pairs),
        "median": {name: {field: median_of(name, field) for field in FIELDS} for name in ("on", "off")},
        "throughput_lost_percent": {
            "median": round(percentile(slower, 0.5) * 100, 2),
            "quartiles": [round(percentile(slower, share) * 100, 2) for share in (0.25, 0.75)],
        },
        "control_cpu_added_percent_of_all": {
            "median": round(percentile(extra, 0.5) * 100, 2),
            "quartiles": [round(percentile(extra, share) * 100, 2) for share in (0.25, 0.75)],
        },
        "cpu_per_token_added_percent": {
            "median": round(percentile(dearer, 0.5) * 100, 2),
            "quartiles": [round(percentile(dearer, share) * 100, 2) for share in (0.25, 0.75)],
        },
    }


def main() -> None:
    parser = command_line(__doc__, "overhead", ranks=8)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=10.0)
    options = parser.parse_args()
    ranks = ["--ranks", str(options.ranks)]
    with (
        tempfile.TemporaryDirectory(prefix="overhead-") as scratch,
        server(ranks, Path(scratch) / "on") as on,
        server([*ranks, "--disable-fault-tolerance"], Path(scratch) / "off") as off,
    ):
        result = summarise(asyncio.run(compare(on, off, options.rounds, options.seconds)))
    lost, added = result["throughput_lost_percent"], result["cpu_per_token_added_percent"]
    print(f"throughput lost {lost['median']} % (quartiles {lost['quartiles']})")
    control = result["control_cpu_added_percent_of_all"]
    print(
        f"added outside the forward threads {control['median']} % of all (quartiles {control['quartiles']})"
    )
    print(f"processor time added {added['median']} % (quartiles {added['quartiles']})")
    write_result(options.out, result)


if __name__ == "__main__":
    main()
