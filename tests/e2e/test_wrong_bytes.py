"""Wrong bytes in the memory of a rank that serves are found and mended; also when nobody asks, in one that joins."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from typing import Any

import aiohttp
import pytest

from elastic_ep.replay import replay
from tests.e2e.corruptible_server import BORN_SPOILT, SPOIL, SPOILT
from tests.kit.served import Server, chat, http, server, status, until_full

RANKS = 4
DEADLINE_S = 30.0
MODULE = "tests.e2e.corruptible_server"
QUESTION = "Mia has 3 pens. Mia buys 4 more pens. How many pens does Mia have now?"

pytestmark = pytest.mark.timeout(180)


async def slots_of(session: aiohttp.ClientSession, url: str) -> list[dict[str, Any]]:
    async with session.get(f"{url}/v1/fault_tolerance/experts") as response:
        slots: list[dict[str, Any]] = (await response.json())["layers"][SPOILT[0]]["slots"]
        return slots


async def verify(session: aiohttp.ClientSession, url: str) -> list[dict[str, Any]]:
    async with session.post(f"{url}/v1/fault_tolerance/verify") as response:
        found = await response.json()
        assert found["silent"] == [], "who does not answer hides what differs"
        differ: list[dict[str, Any]] = found["differ"]
        return differ


async def until_mended(session: aiohttp.ClientSession, url: str, physical: int, tolerates: int) -> None:
    """The slot is in use again, and nothing is said of its bytes as they were."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            slots = await slots_of(session, url)
            expert = slots[physical]["logical"]
            now = await status(session, url)
            if expert is not None and now["tolerates"] == tolerates:
                sums = {slot["checksum"] for slot in slots if slot["logical"] == expert and slot["alive"]}
                assert len(sums - {None}) == 1
                return
            await asyncio.sleep(0.02)


def corrupt_places(target: Server) -> int:
    return target.events.read_text().count('"Corrupt"')


async def spoil_one_that_serves(target: Server, victim: int) -> None:
    async with http() as session:
        url = target.url
        expected = await chat(session, url, QUESTION, max_tokens=24)
        assert await verify(session, url) == []
        before = await status(session, url)
        physical = victim * len(await slots_of(session, url)) // RANKS + SPOILT[1]
        os.kill(before["engines"][victim]["pid"], SPOIL)
        found = await verify(session, url)
        assert found == [{"layer": SPOILT[0], "physical": physical, "rank": victim}]
        await until_mended(session, url, physical, before["tolerates"])
        assert await verify(session, url) == []
        assert await chat(session, url, QUESTION, max_tokens=24) == expected
        after = await status(session, url)
        pids = [[engine["pid"] for engine in each["engines"]] for each in (before, after)]
        assert pids[0] == pids[1], "nobody had to die for it"


@pytest.fixture(scope="module")
def spoilt(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Whose log replays in the end."""
    with server(["--ranks", str(RANKS)], tmp_path_factory.mktemp("runs"), MODULE) as target:
        yield target
    replay(target.run_dir)


def test_in_a_rank_that_serves(spoilt: Server) -> None:
    asyncio.run(spoil_one_that_serves(spoilt, victim=2))


async def spoil_a_joiner(target: Server) -> None:
    rank, incarnation = BORN_SPOILT
    async with http() as session:
        url = target.url
        expected = await chat(session, url, QUESTION, max_tokens=24)
        before, known = await status(session, url), corrupt_places(target)
        physical = rank * len(await slots_of(session, url)) // RANKS + SPOILT[1]
        os.kill(before["engines"][rank]["pid"], signal.SIGKILL)
        await until_full(session, url, beyond={rank: incarnation - 1})
        async with asyncio.timeout(DEADLINE_S):
            while corrupt_places(target) == known:
                await asyncio.sleep(0.02)
        await until_mended(session, url, physical, before["tolerates"])
        assert await verify(session, url) == []
        assert corrupt_places(target) == known + 1
        assert await chat(session, url, QUESTION, max_tokens=24) == expected


def test_in_a_rank_that_joins_though_nobody_asks(spoilt: Server) -> None:
    asyncio.run(spoil_a_joiner(spoilt))
