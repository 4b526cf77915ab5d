"""What the live page costs the server, how smoothly a browser draws it, and how soon a loss is on it.

* `feed`: processor time of a process that serves a group of so many simulated ranks and nothing else, with 0, 1 and 8
  pages that read all they are sent (what simulates the ranks is in all three); bytes of a snapshot and of a frame.
* `frames`: a headless Chromium draws the page of 8 and of 256 simulated ranks, some of which die: frames a second, and
  the longest time between two. It has no GPU: what it paints costs processor time of this machine.
* `losses`: real ranks with work are killed; from the kill to the row in the browser's table.

    python -m bench.page [--seconds 10] [--kills 8] [--out bench/results/page.json]
    python -m bench.page --against COMMIT       the frames alone, of that commit's page and of this one, in turns
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from io import BytesIO
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

from tests.gateway.conftest import settings
from tests.gateway.fakes import sample_text
from tests.kit.bound import Bound
from tests.kit.browser import Tab, browser, tab
from tests.kit.served import chat, http, server, status, summary, until_full, write_result
from tests.kit.simulated_group import SimulatedGroup

from bench.kit.command_line import command_line
from elastic_ep.gateway.app import create_app, serve
from elastic_ep.gateway.page import routes
from elastic_ep.group.metrics import Metrics

READ = """
import asyncio, sys, aiohttp
async def read(session):
    async with session.get(sys.argv[1] + "/page/feed") as response:
        size = 0
        async for chunk in response.content.iter_any():
            size += len(chunk)
async def main():
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:
        await asyncio.gather(*(read(session) for _ in range(int(sys.argv[2]))))
asyncio.run(main())
"""
COUNT_FRAMES = """seconds => new Promise(done => {
  const gaps = [], began = performance.now();
  let before = began;
  const frame = now => {
    gaps.push(now - before);
    before = now;
    if (now - began < seconds * 1000) requestAnimationFrame(frame);
    else done(gaps.slice(2));
  };
  requestAnimationFrame(frame);
})"""
LIVE_MS = 30_000.0
ROUNDS = 3
RANKS = 4


@asynccontextmanager
async def simulated(ranks: int) -> AsyncIterator[str]:
    """The URL of a server of a group that lives and dies."""
    group, metrics = SimulatedGroup(ranks), Metrics()
    listening = await serve(
        create_app(group, settings(), sample_text(), metrics, sample_text), "127.0.0.1", 0, grace_s=0.1
    )
    living = asyncio.create_task(group.live(metrics))
    try:
        yield listening.url
    finally:
        living.cancel()
        await listening.close()


async def feed_cost(ranks: int, seconds: float) -> dict[str, Any]:
    found: dict[str, Any] = {}
    async with simulated(ranks) as url:
        for pages in (0, 1, 8):
            readers = Bound([sys.executable, "-c", READ, url, str(pages)]) if pages else None
            await asyncio.sleep(3)
            began, used = time.monotonic(), time.process_time()
            await asyncio.sleep(seconds)
            share = (time.process_time() - used) / (time.monotonic() - began)
            found[f"{pages} pages, ms of processor a second"] = round(share * 1000, 2)
            if readers is not None:
                readers.kill()
                readers.wait()
        async with http() as session, session.get(url + "/page/feed") as response:
            sizes = [len(await response.content.readuntil(b"\n\n")) for _ in range(6)]
    return {**found, "bytes of a snapshot": sizes[0], "bytes of a frame": round(sum(sizes[1:]) / 5)}


async def frames(ranks: int, seconds: float) -> dict[str, Any]:
    async with simulated(ranks) as url, browser() as chrome, tab(chrome, url + "/", 1440, 1000) as opened:
        await opened.page.wait_for_selector("#link.up", timeout=LIVE_MS)
        await asyncio.sleep(2)
        gaps = await opened.page.evaluate(COUNT_FRAMES, seconds)
        busy = await _script_share(opened, seconds)
    return {
        "frames a second": round(1000 * len(gaps) / sum(gaps), 1),
        "gap_ms": summary(gaps),
        "share of the page's thread in scripts": busy,
    }


def page_of(commit: str, folder: Path) -> Path:
    """The page's files as they were; those that it had not yet are there too, and nothing asks for them."""
    place = routes.ASSETS.relative_to(Path(__file__).parents[1])
    packed = subprocess.run(["git", "archive", commit, str(place)], capture_output=True, check=True).stdout
    shutil.copytree(routes.ASSETS, folder / place)
    with tarfile.open(fileobj=BytesIO(packed)) as archive:
        archive.extractall(folder, filter="data")
    return folder / place


def against(commit: str, seconds: float) -> dict[str, Any]:
    """Frames a second of 256 ranks, both pages fed by this server, in turns: the machine is the same for both."""
    with tempfile.TemporaryDirectory() as scratch:
        sides = {commit: page_of(commit, Path(scratch)), "this": routes.ASSETS}
        found: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
        for _ in range(ROUNDS):
            for side, assets in sides.items():
                with patch.object(routes, "ASSETS", assets):
                    found[side].append(asyncio.run(frames(256, seconds)))
                print(side, found[side][-1], flush=True)
    return {
        f"{side}: median frames a second": median(each["frames a second"] for each in rounds)
        for side, rounds in found.items()
    } | {"rounds": found}


async def _script_share(opened: Tab, seconds: float) -> float:
    """Of its time, what the page's own code takes: the rest of a late frame is the browser's painting."""
    devtools = await opened.page.context.new_cdp_session(opened.page)
    await devtools.send("Performance.enable")

    async def script_s() -> float:
        told = await devtools.send("Performance.getMetrics")
        return float(next(each["value"] for each in told["metrics"] if each["name"] == "ScriptDuration"))

    before = await script_s()
    await asyncio.sleep(seconds)
    return round((await script_s() - before) / seconds, 3)


async def losses(kills: int) -> dict[str, Any]:
    shown_ms: list[float] = []
    with tempfile.TemporaryDirectory() as scratch, server(["--ranks", str(RANKS)], Path(scratch)) as running:
        async with (
            http() as session,
            browser() as chrome,
            tab(chrome, running.url + "/", 1440, 1000) as opened,
        ):
            await until_full(session, running.url)
            await opened.page.wait_for_selector("#link.up", timeout=LIVE_MS)
            ended = False

            async def ask(number: int) -> None:
                while not ended:
                    await chat(
                        session, running.url, f"Tom has {number} apples.", max_tokens=100, ignore_eos=True
                    )

            asking = [asyncio.create_task(ask(number)) for number in range(8)]
            for number in range(kills):
                victim = (await until_full(session, running.url))["engines"][number % RANKS]
                await asyncio.sleep(1)
                row = f'tr[data-loss="{victim["id"]}.{victim["incarnation"]}"]'
                waiting = asyncio.create_task(opened.page.wait_for_selector(row, timeout=LIVE_MS))
                await asyncio.sleep(0.2)
                began = time.monotonic()
                os.kill(victim["pid"], signal.SIGKILL)
                await waiting
                shown_ms.append((time.monotonic() - began) * 1000)
                await until_full(session, running.url, beyond={victim["id"]: victim["incarnation"]})
            ended = True
            await asyncio.gather(*asking)
            await status(session, running.url)
    return {"kill to row, ms": summary(shown_ms)}


async def measure(options: argparse.Namespace) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for ranks in (8, 256):
        result[f"feed, {ranks} ranks"] = await feed_cost(ranks, options.seconds)
        print(ranks, result[f"feed, {ranks} ranks"], flush=True)
    for ranks in (8, 256):
        result[f"frames, {ranks} ranks"] = await frames(ranks, options.seconds)
        print(ranks, result[f"frames, {ranks} ranks"], flush=True)
    return result


def main() -> None:
    parser = command_line(__doc__, "page")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--kills", type=int, default=8)
    parser.add_argument("--against", metavar="COMMIT", help="compare the page's frames with that commit's")
    options = parser.parse_args()
    if options.against is not None:
        write_result(options.out, against(options.against, options.seconds))
        return
    result = asyncio.run(measure(options))
    result["losses"] = asyncio.run(losses(options.kills))
    print(result["losses"])
    write_result(options.out, result)


if __name__ == "__main__":
    main()
