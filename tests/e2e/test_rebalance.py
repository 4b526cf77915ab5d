"""Experts change places while streams go on: no other text, no lost tolerance; and joiners fed by their peers."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from train.problems import held_out

from elastic_ep.replay import replay
from elastic_ep.weights.transfer import available
from tests.e2e.test_repair import answers, experts, verify
from tests.kit.served import Server, chat, http, server, status, until_full

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

QUESTIONS = [problem.question for problem in held_out(4)]


async def rebalance(session: aiohttp.ClientSession, url: str) -> dict[str, Any]:
    async with session.post(f"{url}/rebalance") as response:
        assert response.status == 200
        found: dict[str, Any] = await response.json()
        return found


async def metric(session: aiohttp.ClientSession, url: str, name: str) -> float:
    async with session.get(f"{url}/metrics") as response:
        lines = (await response.text()).splitlines()
    return next((float(line.split()[1]) for line in lines if line.startswith(name + " ")), 0.0)


async def rebalance_under_load(target: Server) -> None:
    async with http() as session:
        url = target.url
        expected = await answers(session, url)
        before = await experts(session, url)
        async with asyncio.timeout(60):
            done = {"planned": 0}
            while not done["planned"]:  # ranks report their load once in a while
                under_way = asyncio.create_task(answers(session, url))
                done = await rebalance(session, url)
                assert await under_way == expected
        assert done["planned"] == done["made"], "a spare slot on every rank lets all of it through"
        assert done["imbalance"] < done["imbalance_before"]
        after = await experts(session, url)
        assert after["version"] == done["version"] > before["version"]
        assert after["tolerates"] == before["tolerates"] == 1
        assert await answers(session, url) == expected
        assert (await verify(session, url))["differ"] == []
        assert await metric(session, url, "elastic_ep:eplb_rebalances_total") >= 1


async def lose_a_rank_during_a_plan(target: Server) -> None:
    async with http() as session:
        url = target.url
        expected = await answers(session, url)
        engines = (await status(session, url))["engines"]
        under_way = asyncio.create_task(answers(session, url))
        plan = asyncio.create_task(rebalance(session, url))
        await asyncio.sleep(0)
        os.kill(engines[3]["pid"], signal.SIGKILL)
        done = await plan
        assert done["made"] <= done["planned"]
        assert await under_way == expected
        await until_full(session, url)
        assert await answers(session, url) == expected
        assert (await status(session, url))["tolerates"] == 1
        assert (await verify(session, url))["differ"] == []


@pytest.fixture(scope="module")
def eight(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Whose log replays when both tests have passed."""
    with server(["--ranks", "8", "--enable-eplb"], tmp_path_factory.mktemp("runs")) as target:
        yield target
    replay(target.run_dir)


def test_a_loss_during_a_plan(eight: Server) -> None:
    asyncio.run(lose_a_rank_during_a_plan(eight))


def test_rebalancing_while_serving(eight: Server) -> None:
    asyncio.run(rebalance_under_load(eight))


async def every_so_many_steps(target: Server) -> None:
    async with http() as session:
        url = target.url
        expected = await answers(session, url)
        async with asyncio.timeout(60):
            while not await metric(session, url, "elastic_ep:eplb_rebalances_total"):
                assert await answers(session, url) == expected


def test_rebalancing_every_so_many_steps(tmp_path: Path) -> None:
    arguments = ["--ranks", "4", "--enable-eplb", "--eplb-rebalance-num-iterations", "200"]
    with server(arguments, tmp_path) as target:
        asyncio.run(every_so_many_steps(target))


async def joiner_fed_by_peers(target: Server) -> None:
    async with http() as session:
        url = target.url
        expected = [await chat(session, url, question, max_tokens=24) for question in QUESTIONS]
        engines = (await status(session, url))["engines"]
        os.kill(engines[2]["pid"], signal.SIGKILL)
        await until_full(session, url)
        async with asyncio.timeout(30):
            while not (came := await metric(session, url, 'elastic_ep:expert_copies_total{source="peer"}')):
                await asyncio.sleep(0.02)
        held = [slot for slot in (await experts(session, url))["layers"][0]["slots"] if slot["rank"] == 2]
        assert came == 4 * sum(slot["logical"] is not None for slot in held), (
            "all of its experts, in 4 layers"
        )
        assert [await chat(session, url, question, max_tokens=24) for question in QUESTIONS] == expected
        assert (await verify(session, url))["differ"] == []


def test_a_joiner_takes_all_its_weights_from_peers(tmp_path: Path) -> None:
    """Random weights lie on no disk."""
    reason = available()
    if reason is not None:
        pytest.skip(reason)
    with server(["--ranks", "4", "--load-format", "dummy"], tmp_path) as target:
        asyncio.run(joiner_fed_by_peers(target))
    replay(target.run_dir)
