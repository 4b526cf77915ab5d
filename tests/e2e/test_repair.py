"""Experts that lost a copy get another one on the survivors, while streams go on."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from train.problems import held_out

from elastic_ep.replay import replay
from tests.kit.served import Server, chat, http, server, status

RANKS, EXPERTS, SLOTS = 8, 16, 8
QUESTIONS = [problem.question for problem in held_out(16)]
REPAIR_DEADLINE_S = 30.0

pytestmark = pytest.mark.timeout(300)


async def answers(session: aiohttp.ClientSession, url: str) -> list[str]:
    sampled = {"temperature": 0.8, "seed": 11, "max_tokens": 160}
    return await asyncio.gather(
        *(
            chat(session, url, q, **(sampled if i % 2 else {"max_tokens": 160}))
            for i, q in enumerate(QUESTIONS)
        )
    )


async def until_tolerates(
    session: aiohttp.ClientSession, url: str, wanted: int, alive: int
) -> dict[str, Any]:
    async with asyncio.timeout(REPAIR_DEADLINE_S):
        while True:
            now = await status(session, url)
            healthy = sum(engine["status"] == "healthy" for engine in now["engines"])
            if healthy == alive and now["tolerates"] == wanted:
                return now
            await asyncio.sleep(0.02)


async def experts(session: aiohttp.ClientSession, url: str) -> dict[str, Any]:
    async with session.get(f"{url}/v1/fault_tolerance/experts") as response:
        found: dict[str, Any] = await response.json()
        return found


async def verify(session: aiohttp.ClientSession, url: str) -> dict[str, Any]:
    async with session.post(f"{url}/v1/fault_tolerance/verify") as response:
        found: dict[str, Any] = await response.json()
        return found


def possible(alive: int) -> int:
    return min(alive * SLOTS // EXPERTS, RANKS * SLOTS // EXPERTS) - 1


async def lose_one_after_another(target: Server) -> None:
    async with http() as session:
        url = target.url
        expected = await answers(session, url)
        for alive in (7, 6, 5, 4):
            now = await status(session, url)
            victim = next(engine for engine in now["engines"] if engine["status"] == "healthy")
            under_way = asyncio.create_task(answers(session, url))
            await asyncio.sleep(0)
            os.kill(victim["pid"], signal.SIGKILL)
            await until_tolerates(session, url, possible(alive), alive)
            assert await under_way == expected
            assert await answers(session, url) == expected
        found = await verify(session, url)
        assert found == {"checked": 4 * SLOTS * 4, "differ": [], "silent": []}
        layers = (await experts(session, url))["layers"]
        for layer in layers:
            sums: dict[int, set[str]] = {}
            for slot in layer["slots"]:
                if slot["alive"]:
                    sums.setdefault(slot["logical"], set()).add(slot["checksum"])
            assert len(sums) == EXPERTS
            assert all(len(of_one) == 1 for of_one in sums.values()), "copies of an expert differ"


def test_eight_to_four_ranks_with_repair_between(tmp_path: Path) -> None:
    """`--relaunch-limit 0`: who dies stays away. Tolerance comes back as far as the slots of the living allow."""
    redundant = RANKS * SLOTS - EXPERTS
    arguments = ["--ranks", str(RANKS), "--ep-num-redundant-experts", str(redundant), "--relaunch-limit", "0"]
    with server(arguments, tmp_path) as target:
        asyncio.run(lose_one_after_another(target))
    replay(target.run_dir)


async def lose_two_that_share_an_expert(target: Server) -> None:
    async with http() as session:
        url = target.url
        expected = await answers(session, url)
        slots = (await experts(session, url))["layers"][0]["slots"]
        holders = [slot["rank"] for slot in slots if slot["logical"] == 0]
        assert len(holders) == 2
        engines = (await status(session, url))["engines"]
        under_way = asyncio.create_task(answers(session, url))
        await asyncio.sleep(0)
        for rank in holders:
            os.kill(engines[rank]["pid"], signal.SIGKILL)
        await until_tolerates(session, url, 0, RANKS - 2)
        assert await under_way == expected
        alive = {s["logical"] for s in (await experts(session, url))["layers"][0]["slots"] if s["alive"]}
        assert 0 in alive, "expert 0 lives again, on a rank that did not have it"


def test_an_expert_without_any_copy_is_loaded_onto_a_survivor(tmp_path: Path) -> None:
    with server(["--ranks", str(RANKS), "--relaunch-limit", "0"], tmp_path) as target:
        asyncio.run(lose_two_that_share_an_expert(target))
    replay(target.run_dir)
