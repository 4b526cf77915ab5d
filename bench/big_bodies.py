"""What a large request costs everybody else: gaps of a stream and of /health, without and beside each of them.

    python -m bench.big_bodies [--other URL] [--out FILE]

With `--other` a server of another commit is measured by the same client in the same run, before this one. It should
serve the same folder (`--model`, made if there is none) as "default", with as many ranks and `--load-format dummy`.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any

import aiohttp
from tests.kit.large_bodies import CONTEXT, bodies
from tests.kit.served import MODEL, chat, http, percentile, server, shaped_model, write_result

from bench.kit.command_line import command_line

QUIET_S = 4.0
LEAVE_S = {"/v1/completions": 3.0, "/v1/chat/completions": 12.0}
"""A client whose prompt is accepted goes then."""
POLL_S = 0.005


def longest_gap(stamps: list[float], begin: float, end: float) -> float:
    """Milliseconds between two stamps of which one is in [begin, end]."""
    gaps = [b - a for a, b in pairwise(stamps) if b >= begin and a <= end]
    return round(max(gaps, default=float("nan")) * 1000, 1)


class Others:
    """A stream and a poll of /health that go on until cancelled."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session, self._url = session, url
        self.tokens: list[float] = []
        self.polls: list[float] = []

    async def stream(self) -> None:
        while True:
            await chat(
                self._session, self._url, "Count.", stamps=self.tokens, max_tokens=900, ignore_eos=True
            )

    async def poll(self) -> None:
        while True:
            async with self._session.get(f"{self._url}/health") as response:
                await response.read()
            self.polls.append(time.monotonic())
            await asyncio.sleep(POLL_S)

    async def beside(self, work: Callable[[], Awaitable[Any]]) -> dict[str, Any]:
        begin = time.monotonic()
        outcome = await work()
        end = time.monotonic()
        await asyncio.sleep(0.2)
        now = time.monotonic()  # who stands still yet has stood still so long at least
        return {
            "answered_after_s": round(end - begin, 3),
            "stream_gap_ms": longest_gap([*self.tokens, now], begin, end),
            "health_gap_ms": longest_gap([*self.polls, now], begin, end),
            "outcome": outcome,
        }


async def measure(url: str) -> dict[str, Any]:
    made = {
        name: (path, json.dumps({"model": MODEL, "max_tokens": 1, **body}))
        for name, (path, body) in bodies().items()
    }
    async with http() as session, http() as another:
        others = Others(session, url)
        tasks = [asyncio.create_task(others.stream()), asyncio.create_task(others.poll())]
        while not others.tokens:
            await asyncio.sleep(0.05)
        found = {"nothing": await others.beside(lambda: asyncio.sleep(QUIET_S, ""))}
        for name, (path, body) in made.items():

            async def post(path: str = path, body: str = body) -> int | str:
                headers = {"Content-Type": "application/json"}
                try:
                    async with (
                        asyncio.timeout(LEAVE_S.get(path)),
                        another.post(url + path, data=body, headers=headers) as response,
                    ):
                        await response.read()
                        return response.status
                except TimeoutError:
                    return "left"

            found[name] = await others.beside(post)
            show(name, found[name])
        for task in tasks:
            task.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks)
    found["nothing"]["stream_gap_p50_ms"] = round(
        percentile([b - a for a, b in pairwise(others.tokens)], 0.5) * 1000, 1
    )
    return found


def show(name: str, row: dict[str, Any]) -> None:
    print(
        f"  {name:32} answered {row['outcome']} after {row['answered_after_s']:7.3f} s; longest gap: "
        f"stream {row['stream_gap_ms']:7.1f} ms, /health {row['health_gap_ms']:7.1f} ms",
        flush=True,
    )


def of_this_checkout(model: Path, ranks: int) -> dict[str, Any]:
    flags = ["--ranks", str(ranks), "--model", str(model), "--load-format", "dummy"]
    with tempfile.TemporaryDirectory() as folder, server(flags, Path(folder)) as running:
        return asyncio.run(measure(running.url))


def main() -> None:
    parser = command_line(__doc__, None, ranks=2)
    parser.add_argument("--other", metavar="URL", help="a server of another commit, to measure first")
    parser.add_argument("--model", type=Path, default=Path(tempfile.gettempdir()) / "elastic_ep-long-context")
    options = parser.parse_args()
    if not options.model.exists():
        shaped_model(options.model, {"max_position_embeddings": CONTEXT})
    sides: dict[str, Callable[[], dict[str, Any]]] = {}
    if options.other:
        sides["other"] = lambda: asyncio.run(measure(options.other))
    sides["this"] = lambda: of_this_checkout(options.model, options.ranks)
    result = {}
    for name, side in sides.items():
        print(f"{name} server")
        result[name] = side()
        show("nothing", result[name]["nothing"])
    if options.out:
        write_result(options.out, result)


if __name__ == "__main__":
    main()
