"""Kill a rank of a model with gigabytes of experts: how long until every expert has its copies again, and at what rate?

    python -m bench.repair_large [--out bench/results/repair_large.json]

Random weights, so there is no disk: survivors pull what was lost from each other. First without requests, then under
load, with tokens a second while copies are made beside those after. In the same run: TransferEngine bare, between two
processes with nothing else to do, on experts of the same size.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import torch
from tests.kit.served import Server, http, server, status, write_result

from bench.kit.bare_transfer import measure_size
from bench.kit.command_line import command_line
from bench.kit.large_model import write_model
from bench.kit.load import generated, under_load
from elastic_ep.weights.transfer import apply_settings, available

RANKS, SLOTS, LAYERS, EXPERTS = 8, 32, 4, 96
HIDDEN, WIDTH = 1024, 512
EXPERT_BYTES = 3 * HIDDEN * WIDTH * 4
CONCURRENT = 32
DEADLINE_S = 120.0
SETTLE_S, WINDOW_S, REST_S = 5.0, 10.0, 20.0


async def lose_one(session: aiohttp.ClientSession, target: Server, *, loaded: bool) -> dict[str, Any]:
    url = target.url
    now = await status(session, url)
    wanted = now["tolerates"]
    healthy = [engine for engine in now["engines"] if engine["status"] == "healthy"]
    tokens = await generated(session, url)
    killed_ns, killed = time.monotonic_ns(), time.monotonic()
    os.kill(healthy[0]["pid"], signal.SIGKILL)
    async with asyncio.timeout(DEADLINE_S):
        while True:
            now = await status(session, url)
            left = sum(engine["status"] == "healthy" for engine in now["engines"])
            if left < len(healthy) and now["tolerates"] == wanted:
                break
            await asyncio.sleep(0.02)
    restored = time.monotonic() - killed
    while_repairing = (await generated(session, url) - tokens) / restored
    result = {"restored_s": round(restored, 3), **transfers(target.events, killed_ns)}
    if loaded:
        await asyncio.sleep(WINDOW_S - restored)
        first = (await generated(session, url) - tokens) / (time.monotonic() - killed)
        tokens, began = await generated(session, url), time.monotonic()
        await asyncio.sleep(REST_S)
        alone = (await generated(session, url) - tokens) / (time.monotonic() - began)
        result["tokens_per_s"] = {
            "until_restored": round(while_repairing),
            "first_10_s": round(first),
            "survivors_alone": round(alone),
            "share_until_restored": round(while_repairing / alone, 3),
            "share_first_10_s": round(first / alone, 3),
        }
    return result


def transfers(events: Path, since_ns: int) -> dict[str, Any]:
    """From the log: copies made after `since_ns`, from the first order to the last answer."""
    ordered, copied = [], []
    for line in repair_lines(events, since_ns):
        ordered += [line["t_ns"] for effect in line["effects"] if effect[0] == "Order"]
        if line["heard"][0] == "Copied" and not line["heard"][4]:
            copied.append(line["t_ns"])
    seconds = (copied[-1] - ordered[0]) / 1e9
    return {
        "copies": len(copied),
        "gigabytes": round(len(copied) * EXPERT_BYTES / 1e9, 3),
        "transfer_s": round(seconds, 3),
        "gb_per_s": round(len(copied) * EXPERT_BYTES / 1e9 / seconds, 3),
    }


def repair_lines(events: Path, since_ns: int) -> Iterator[dict[str, Any]]:
    for text in events.read_text().splitlines():
        line = json.loads(text)
        if line.get("machine") == "repair" and line["t_ns"] >= since_ns:
            yield line


async def measure(target: Server) -> dict[str, Any]:
    async with http() as session:
        await asyncio.sleep(SETTLE_S)
        idle = [await lose_one(session, target, loaded=False) for _ in range(1)]
        print(*idle, sep="\n", flush=True)
        async with under_load(session, target, streams=CONCURRENT, problems=256):
            await asyncio.sleep(REST_S)
            loaded = [await lose_one(session, target, loaded=True)]
            print(*loaded, sep="\n", flush=True)
        async with session.post(f"{target.url}/v1/fault_tolerance/verify") as response:
            verified = await response.json()
        async with session.get(f"{target.url}/metrics") as response:
            sources = [
                line
                for line in (await response.text()).splitlines()
                if line.startswith("elastic_ep:expert_copies_total")
            ]
    return {"without_requests": idle, "under_load": loaded, "verify": verified, "sources": sources}


def main() -> None:
    parser = command_line(__doc__, "repair_large")
    options = parser.parse_args()
    apply_settings()
    if (reason := available()) is not None:
        raise SystemExit(reason)
    torch.set_num_threads(1)
    bare = measure_size(HIDDEN, WIDTH, total_bytes=1 << 30, rounds=3)
    with tempfile.TemporaryDirectory(prefix="repair-") as scratch:
        folder = Path(scratch)
        model = write_model(folder)
        redundant = RANKS * SLOTS - EXPERTS
        arguments = ["--ranks", str(RANKS), "--model", str(model), "--load-format", "dummy"]
        arguments += ["--ep-num-redundant-experts", str(redundant), "--relaunch-limit", "0"]
        with server(arguments, folder) as target:
            result = asyncio.run(measure(target))
    raw = bare["gb_per_s"]["bare_blocking"]
    result["model_gigabytes_of_experts"] = round(LAYERS * EXPERTS * EXPERT_BYTES / 1e9, 2)
    result["bare"] = bare
    result["share_of_bare"] = {
        "without_requests": round(
            statistics.mean(one["gb_per_s"] for one in result["without_requests"]) / raw, 3
        ),
        "under_load": round(result["under_load"][0]["gb_per_s"] / raw, 3),
    }
    print({name: result[name] for name in ("share_of_bare", "verify", "sources")})
    write_result(options.out, result)


if __name__ == "__main__":
    main()
