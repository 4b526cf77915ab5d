"""Kill ranks one after another, 8 -> 4, under load: how long until every expert has its copies again?

    python -m bench.repair [--out bench/results/repair.json]

The ranks have spare slots and are not relaunched, so what is lost has to be re-made on survivors: from the checkpoint,
which lies in the page cache. Compared are the texts of 32 streams before and during each loss, and tokens a second in the
second after a kill with those of the survivors later.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
from tests.kit.served import Server, chat, http, server, status, write_result
from train.problems import held_out

from bench.kit.command_line import command_line
from bench.kit.load import generated, under_load

RANKS, EXPERTS, SLOTS = 8, 16, 8
DEADLINE_S = 60.0
REST_S = 6.0


async def texts(session: aiohttp.ClientSession, url: str, questions: list[str]) -> list[str]:
    return await asyncio.gather(*(chat(session, url, question, max_tokens=160) for question in questions))


async def lose_one(session: aiohttp.ClientSession, url: str, alive: int) -> dict[str, Any]:
    engines = (await status(session, url))["engines"]
    victim = next(engine for engine in engines if engine["status"] == "healthy")
    before = (await status(session, url))["tolerates"]
    tokens = await generated(session, url)
    killed = time.monotonic()
    os.kill(victim["pid"], signal.SIGKILL)
    lowest = before
    async with asyncio.timeout(DEADLINE_S):
        while True:
            now = await status(session, url)
            gone = sum(engine["status"] == "healthy" for engine in now["engines"]) == alive
            lowest = min(lowest, now["tolerates"])
            if gone and now["tolerates"] == alive * SLOTS // EXPERTS - 1:
                break
            await asyncio.sleep(0.005)
    restored = time.monotonic() - killed
    await asyncio.sleep(max(0.0, 1.0 - restored))
    during = (await generated(session, url) - tokens) / (time.monotonic() - killed)
    await asyncio.sleep(1.0)
    tokens, started = await generated(session, url), time.monotonic()
    await asyncio.sleep(REST_S)
    own = (await generated(session, url) - tokens) / (time.monotonic() - started)
    return {
        "survivors": alive,
        "tolerates": {"before": before, "lowest": lowest, "restored": now["tolerates"]},
        "restored_ms": round(restored * 1000, 1),
        "tokens_per_s": {"first_second": round(during), "survivors_alone": round(own)},
    }


async def measure(target: Server) -> dict[str, Any]:
    questions = [problem.question for problem in held_out(512)]
    watched = questions[:32]
    losses, differ = [], 0
    async with http() as session, asyncio.TaskGroup() as tasks:
        expected = await texts(session, target.url, watched)
        async with under_load(session, target):
            await asyncio.sleep(REST_S)
            for alive in (7, 6, 5, 4):
                under_way = tasks.create_task(texts(session, target.url, watched))
                losses.append(await lose_one(session, target.url, alive))
                differ += sum(a != b for a, b in zip(await under_way, expected, strict=True))
                print(losses[-1], flush=True)
        async with session.post(f"{target.url}/v1/fault_tolerance/verify") as response:
            verified = await response.json()
    return {
        "losses": losses,
        "texts_different": differ,
        "texts_compared": 4 * len(watched),
        "verify": verified,
    }


def copies(events: Path) -> int:
    lines = (json.loads(line) for line in events.read_text().splitlines())
    return sum(line.get("machine") == "repair" and line["heard"][0] == "Copied" for line in lines)


def main() -> None:
    parser = command_line(__doc__, "repair")
    options = parser.parse_args()
    arguments = ["--ranks", str(RANKS), "--ep-num-redundant-experts", str(RANKS * SLOTS - EXPERTS)]
    with (
        tempfile.TemporaryDirectory(prefix="repair-") as scratch,
        server([*arguments, "--relaunch-limit", "0"], Path(scratch)) as target,
    ):
        result = asyncio.run(measure(target))
        result["copies"] = copies(target.events)
    print({name: value for name, value in result.items() if name != "losses"})
    write_result(options.out, result)


if __name__ == "__main__":
    main()
