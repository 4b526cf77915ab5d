"""Large requests beside a stream: the event loop does not stand still (`tests/loop_plugin.py`) and nobody notices."""

from __future__ import annotations

import asyncio
import io
import json
import os
from collections.abc import Iterator
from contextlib import suppress

import aiohttp
import psutil
import pytest

from tests.kit.large_bodies import CONTEXT, bodies
from tests.kit.served import MODEL, Server, chat, http, server, shaped_model

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(170)]

Made = dict[str, tuple[str, bytes]]
HEADERS = {"Content-Type": "application/json"}
EXPECTED = {
    "one message of 3.9 MB": 400,
    "1,000 messages": 200,
    "template variables, 3.7 MB": 200,
    "600 KB to tokenize": 200,
    "250,000 token ids to detokenize": 200,
    "600,000 token ids": 400,
}

LEFT = (
    "60,000 messages",
    "200 prompts, 3.9 MB",
    "100,000 token ids",
    "100,000 token ids, n=64",
    "a prompt of 400 KB",
)
"""To compute them takes minutes."""
LEAVE_S = 2.0


@pytest.fixture(scope="module")
def long_context(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two ranks, random weights, a context that large prompts fit into."""
    folder = shaped_model(tmp_path_factory.mktemp("model") / "long", {"max_position_embeddings": CONTEXT})
    flags = ["--ranks", "2", "--model", str(folder), "--load-format", "dummy", "--max-queued", "400"]
    with server(flags, tmp_path_factory.mktemp("runs")) as running:
        yield running


@pytest.fixture(scope="module")
def made() -> Made:
    """Made before any event loop runs: name to path and body."""
    more = {"model": MODEL, "max_tokens": 1}
    return {name: (path, json.dumps({**more, **body}).encode()) for name, (path, body) in bodies().items()}


async def post(session: aiohttp.ClientSession, url: str, request: tuple[str, bytes]) -> tuple[int, str]:
    path, body = request
    async with session.post(url + path, data=io.BytesIO(body), headers=HEADERS) as response:
        return response.status, (await response.text())[:200]


async def stream(session: aiohttp.ClientSession, url: str, until: asyncio.Event) -> int:
    """How many streams ran to their end until then."""
    done = 0
    while not until.is_set():
        text = await chat(session, url, "Count.", max_tokens=60, ignore_eos=True)
        assert text
        done += 1
    return done


def test_nobody_notices_a_large_body(long_context: Server, made: Made) -> None:
    async def all_of_them(url: str) -> None:
        over = asyncio.Event()
        async with http() as session, asyncio.timeout(150):
            streaming = asyncio.create_task(stream(session, url, over))
            for name, expected in EXPECTED.items():
                status, text = await post(session, url, made[name])
                assert status == expected, (name, text)
            several = [post(session, url, made["600 KB to tokenize"]) for _ in range(2)]
            assert [status for status, _ in await asyncio.gather(*several)] == [200] * 2
            over.set()
            assert await streaming > 0

    asyncio.run(all_of_them(long_context.url))


def test_large_prompts_whose_clients_leave(long_context: Server, made: Made) -> None:
    """Accepted, handed to ranks, and taken back."""

    async def leave(url: str) -> None:
        over = asyncio.Event()
        async with http() as session, asyncio.timeout(120):
            streaming = asyncio.create_task(stream(session, url, over))
            for name in LEFT:
                with suppress(TimeoutError):
                    await asyncio.wait_for(post(session, url, made[name]), LEAVE_S)
            over.set()
            assert await streaming > 0

    asyncio.run(leave(long_context.url))


def test_the_text_process_is_killed_in_the_middle(long_context: Server, made: Made) -> None:
    async def kill(url: str, pid: int) -> None:
        async with http() as session, asyncio.timeout(60):
            asked = asyncio.create_task(post(session, url, made["600 KB to tokenize"]))
            while not (busy := text_processes(pid)):
                await asyncio.sleep(0.01)
            os.kill(busy[0], 9)
            status, text = await asked
            assert status == 200, text

    asyncio.run(kill(long_context.url, long_context.process.pid))


def text_processes(pid: int) -> list[int]:
    found = []
    for child in psutil.Process(pid).children():
        with suppress(psutil.NoSuchProcess):
            if "elastic_ep: text" in " ".join(child.cmdline()):
                found.append(child.pid)
    return found
