"""The real server on a GPU: an answer, a SIGKILL in the middle of the same answer, and full strength again."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
from train.problems import held_out

from elastic_ep.host.mps import PROGRAM
from tests.kit.served import Server, Stamps, chat, http, server, status, until_full

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(300)]

QUESTIONS = [problem.question for problem in held_out(8)]
ARGUMENTS = ["--ranks", "4", "--device", "cuda", "--num-gpu-blocks-override", "512"]

needs_mps = pytest.mark.skipif(shutil.which(PROGRAM) is None, reason="no MPS")


@pytest.fixture(
    scope="module",
    params=[pytest.param([], id="time slices"), pytest.param(["--mps"], id="mps", marks=needs_mps)],
)
def serving(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with server([*ARGUMENTS, *request.param], tmp_path_factory.mktemp("runs")) as running:
        yield running


def daemons() -> set[psutil.Process]:
    """MPS's control daemons and servers, whoever started them."""
    return {process for process in psutil.process_iter() if process.name().startswith("nvidia-cuda-mps")}


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
@needs_mps
def test_the_private_daemon_ends_with_the_run(end: signal.Signals, tmp_path: Path) -> None:
    before = daemons()
    with server([*ARGUMENTS, "--mps"], tmp_path) as running:
        started = list(daemons() - before)
        assert started
        running.process.send_signal(end)
        running.process.wait(60)
    _, alive = psutil.wait_procs(started, timeout=60)
    assert not alive


async def answers(url: str, victim: int | None = None) -> list[str]:
    """To all questions at once; the victim is killed when the first token has come."""
    async with http() as session:
        before = await until_full(session, url)
        stamps = Stamps()
        tasks = [
            asyncio.create_task(
                chat(session, url, question, stamps=stamps, temperature=0.0, max_tokens=100, ignore_eos=True)
            )
            for question in QUESTIONS
        ]
        if victim is not None:
            await asyncio.wait_for(stamps.reach(), 60)
            os.kill(before["engines"][victim]["pid"], signal.SIGKILL)
        texts = await asyncio.wait_for(asyncio.gather(*tasks), 120)
        if victim is not None:
            await until_replaced(session, url, before["engines"][victim])
            await until_full(session, url)
        return texts


async def until_replaced(session: aiohttp.ClientSession, url: str, old: dict[str, Any]) -> None:
    async with asyncio.timeout(60):
        while True:
            engine = (await status(session, url))["engines"][old["id"]]
            if engine["incarnation"] > old["incarnation"]:
                return
            await asyncio.sleep(0.02)


def test_it_answers(serving: Server) -> None:
    async def one() -> str:
        async with http() as session:
            return await chat(session, serving.url, held_out(1)[0].question, temperature=0.0, max_tokens=160)

    assert asyncio.run(one()).endswith(f"#### {held_out(1)[0].answer}")


@pytest.mark.parametrize("victim", [0, 2])
def test_a_killed_rank_costs_no_token(serving: Server, victim: int) -> None:
    expected = asyncio.run(answers(serving.url))
    assert asyncio.run(answers(serving.url, victim)) == expected
