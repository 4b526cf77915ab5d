"""The event log of a real group: it turns over, a rank is killed, and all that is left replays, with no text in it."""

from __future__ import annotations

import asyncio
import base64
import os
import signal
import stat
from array import array
from pathlib import Path

import aiohttp
import pytest
from tokenizers import Tokenizer
from train.problems import held_out

from elastic_ep.event_log.files import CURRENT, RANKS
from elastic_ep.placement_picture import NothingLost, moments
from elastic_ep.replay import SAME, main
from elastic_ep.run import BUNDLED_MODEL
from tests.kit.served import Server, http, server, status, until_full

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(300)]

PROMPT = " ".join(problem.question for problem in held_out(12))


async def complete(session: aiohttp.ClientSession, url: str, tokens: int) -> list[int]:
    body = {
        "model": "default",
        "prompt": PROMPT,
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0.7,
    }
    async with session.post(f"{url}/v1/completions", json={**body, "seed": 424_242_424_242}) as response:
        answer = await response.json()
    assert response.status == 200, answer
    ids: list[int] = (
        Tokenizer.from_file(str(BUNDLED_MODEL / "tokenizer.json")).encode(answer["choices"][0]["text"]).ids
    )
    return ids


async def until_turned(running: Server, files: int, *, kill: bool) -> list[int]:
    """Requests, a dozen at a time, until the run's folder holds so many. The tokens of the last answer."""
    async with http() as session, asyncio.timeout(240):
        await until_full(session, running.url)
        while True:
            asked = [asyncio.create_task(complete(session, running.url, 120)) for _ in range(12)]
            if kill:
                kill = False
                os.kill((await status(session, running.url))["engines"][1]["pid"], signal.SIGKILL)
            answers = await asyncio.gather(*asked)
            if len(os.listdir(running.run_dir)) >= files:
                return answers[-1]


async def one_answer(running: Server) -> None:
    async with http() as session:
        await complete(session, running.url, 20)


def traces(tokens: list[int]) -> list[bytes]:
    """What five tokens in a row, or many packed, look like in a log that has them."""
    rows = [",".join(map(str, tokens[at : at + 5])).encode() for at in range(0, len(tokens) - 5, 5)]
    packed = [base64.b64encode(array("I", tokens[at:]).tobytes())[4:60] for at in range(3)]
    return rows + packed + [b"424242424242"]


def test_a_log_that_turns_over_replays_and_has_no_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = os.umask(0)
    try:
        with server(["--ranks", "3", "--event-log-max-mb", "1"], tmp_path) as running:
            answer = asyncio.run(until_turned(running, 5, kill=True))
    finally:
        os.umask(old)
    folder = running.run_dir
    files = sorted(file for file in folder.iterdir() if file.is_file())
    of_ranks = sorted((folder / RANKS).rglob("*.jsonl"))
    ranks = {file.parent.name for file in of_ranks}
    assert ranks >= {"0.1", "1.1", "2.1"}
    assert {stat.S_IMODE(file.stat().st_mode) for file in files + of_ranks} == {0o600}
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert sum(file.stat().st_size for file in files + of_ranks) <= 1 << 20
    assert main([str(folder)]) == SAME
    told = capsys.readouterr().out
    assert "loss of rank 1.1" in told
    assert f"{len(ranks)} logs of ranks" in told
    for file in files:
        assert main([str(file), "--quiet"]) == SAME
    assert any(drawn(file) for file in files)
    whole = b"".join(file.read_bytes() for file in files + of_ranks)
    prompt = Tokenizer.from_file(str(BUNDLED_MODEL / "tokenizer.json")).encode(PROMPT).ids
    assert not [trace for trace in traces(prompt) + traces(answer) if trace in whole]
    assert held_out(1)[0].question.encode()[:20] not in whole


def drawn(file: Path) -> bool:
    try:
        return bool(moments(file))
    except NothingLost:
        return False


def test_a_full_log_has_it_all_and_off_none(tmp_path: Path) -> None:
    with server(["--ranks", "1", "--event-log", "full"], tmp_path) as running:
        asyncio.run(until_turned(running, 2, kill=False))
    assert main([str(running.run_dir), "--quiet"]) == SAME
    whole = (running.run_dir / CURRENT).read_bytes()
    prompt = Tokenizer.from_file(str(BUNDLED_MODEL / "tokenizer.json")).encode(PROMPT).ids
    assert [trace for trace in traces(prompt) if trace in whole]
    with server(["--ranks", "1", "--event-log", "off"], tmp_path / "off") as running:
        asyncio.run(one_answer(running))
    assert not (tmp_path / "off").exists()
