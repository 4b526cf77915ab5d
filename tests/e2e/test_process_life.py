"""How the whole thing ends: gracefully, by SIGKILL, and by a rank that cannot live."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import aiohttp
import psutil
import pytest
from train.problems import held_out

from elastic_ep.replay import replay
from elastic_ep.run import BUNDLED_MODEL
from tests.kit.bound import run
from tests.kit.processes import stop
from tests.kit.served import Stamps, chat, http, server, status, until_full

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(120)]


def family(pid: int) -> list[psutil.Process]:
    return psutil.Process(pid).children(recursive=True)


def sockets_directory(pid: int) -> Path:
    connections = psutil.Process(pid).net_connections(kind="unix")
    paths = [str(connection.laddr) for connection in connections]
    return next(Path(path).parent for path in paths if path.endswith("/pub"))


def wait_gone(processes: list[psutil.Process], directory: Path, deadline_s: float) -> None:
    _, alive = psutil.wait_procs(processes, timeout=deadline_s)
    assert not alive
    limit = time.monotonic() + deadline_s
    while directory.exists():
        assert time.monotonic() < limit, f"{directory} is left"
        time.sleep(0.02)


def test_sigterm_lets_streams_finish_and_leaves_nothing(tmp_path: Path) -> None:
    """Of a group of an odd size, which has answered."""

    async def stream_and_stop(url: str, pid: int) -> str:
        stamps = Stamps()
        async with http() as session:
            await until_full(session, url)
            answer = await chat(session, url, held_out(1)[0].question, temperature=0.0)
            assert answer.endswith(f"#### {held_out(1)[0].answer}")
            task = asyncio.create_task(
                chat(session, url, held_out(1)[0].question, stamps=stamps, max_tokens=60, ignore_eos=True)
            )
            async with asyncio.timeout(30):
                await stamps.reach()
            os.kill(pid, signal.SIGTERM)
            return await asyncio.wait_for(task, 30)

    with server(["--ranks", "5"], tmp_path) as running:
        processes, directory = family(running.process.pid), sockets_directory(running.process.pid)
        assert len(processes) >= 6
        text = asyncio.run(stream_and_stop(running.url, running.process.pid))
        assert text
        assert running.process.wait(30) == 0
        wait_gone(processes, directory, 5)
        assert running.events.read_text().count('"fork_server_ready"') == 1


def test_sigkill_of_the_run_process_leaves_nothing(tmp_path: Path) -> None:
    """Of a group of one, which has answered."""

    async def ask(url: str) -> str:
        async with http() as session:
            await until_full(session, url)
            return await chat(session, url, held_out(1)[0].question, temperature=0.0)

    with server(["--ranks", "1"], tmp_path) as running:
        assert asyncio.run(ask(running.url)).endswith(f"#### {held_out(1)[0].answer}")
        processes, directory = family(running.process.pid), sockets_directory(running.process.pid)
        stop(processes[-1].pid)  # a stopped one must go, too
        running.process.kill()
        running.process.wait()
        wait_gone(processes, directory, 5)


async def relaunch(session: aiohttp.ClientSession, url: str, **body: int) -> dict[str, Any]:
    async with session.post(f"{url}/v1/fault_tolerance/relaunch", json=body) as response:
        assert response.status == 200
        answer: dict[str, Any] = await response.json()
        return answer


def test_a_rank_that_keeps_dying_waits_ever_longer_and_comes_back_when_it_is_told_to(tmp_path: Path) -> None:
    """Killed before it serves, over and over: a crash loop. The rest serves meanwhile."""

    async def kill_until_it_waits_long(url: str) -> None:
        async with http() as session:
            async with asyncio.timeout(60):
                while True:
                    engine = (await status(session, url))["engines"][1]
                    if "to try now" in engine["reason"]:
                        break
                    if engine["pid"] and engine["state"] not in ("Failed", "Serving"):
                        with suppress(ProcessLookupError):
                            os.kill(engine["pid"], signal.SIGKILL)
                    elif (
                        engine["state"] == "Serving"
                    ):  # this death does not count, but the next launch can be caught
                        with suppress(ProcessLookupError):
                            os.kill(engine["pid"], signal.SIGKILL)
                    await asyncio.sleep(0.005)
            assert engine["state"] == "Failed"
            assert engine["status"] == "dead"
            assert "(early deaths in a row: " in engine["reason"]
            text = await chat(session, url, held_out(1)[0].question, temperature=0.0)
            assert text.endswith(f"#### {held_out(1)[0].answer}")
            assert await relaunch(session, url, rank=1) == {"relaunched": [1], "running": []}
            await until_full(session, url)
            assert await relaunch(session, url) == {"relaunched": [], "running": [0, 1, 2]}

    with server(["--ranks", "3", "--relaunch-limit", "1"], tmp_path) as running:
        asyncio.run(kill_until_it_waits_long(running.url))


@pytest.mark.parametrize("kill", ["one", "all"])
def test_when_nothing_will_serve_any_more_all_are_told_and_the_process_ends(
    tmp_path: Path, kill: str
) -> None:
    """Experts without a copy and no slot for them, or nobody left: streams end, requests get 503, and so does /health."""

    async def watch_it_end(url: str) -> None:
        async with http() as session:
            stamps = Stamps()
            question = held_out(1)[0].question
            under_way = asyncio.create_task(
                chat(session, url, question, stamps=stamps, max_tokens=100, ignore_eos=True)
            )
            async with asyncio.timeout(30):
                await stamps.reach()
            engines = (await status(session, url))["engines"]
            for engine in engines if kill == "all" else engines[1:2]:
                os.kill(engine["pid"], signal.SIGKILL)
            async with asyncio.timeout(10):
                with pytest.raises(RuntimeError, match="error in the stream"):
                    await under_way
                async with session.get(f"{url}/health") as response:
                    assert response.status == 503
                    assert "--relaunch-limit 0" in (await response.json())["reason"]
                body = {"model": "default", "messages": [{"role": "user", "content": question}]}
                async with session.post(f"{url}/v1/chat/completions", json=body) as response:
                    assert response.status == 503
                    assert "Retry-After" in response.headers
                async with session.get(f"{url}/live") as response:
                    assert response.status == 200

    arguments = ["--ranks", "3", "--ep-num-redundant-experts", "0", "--relaunch-limit", "0"]
    with server(arguments, tmp_path) as running:
        processes, directory = family(running.process.pid), sockets_directory(running.process.pid)
        asyncio.run(watch_it_end(running.url))
        assert running.process.wait(30) == 1
        wait_gone(processes, directory, 5)


@pytest.mark.parametrize("do", ["raise", "exit"])
def test_when_every_rank_fails_to_start_alike_it_is_said_once(tmp_path: Path, do: str) -> None:
    script = str(Path(__file__).with_name("failing_run.py"))
    flags = ["--ranks", "2", "--port", "0", "--log-dir", str(tmp_path)]
    done = run([sys.executable, script, do, *flags], 60)
    assert done.returncode == 2, done.stderr
    reason = {"raise": "RuntimeError: cannot compile", "exit": "exit status 7"}[do]
    assert done.stderr.count(reason) == 1, done.stderr
    assert "Traceback" not in done.stderr
    (log,) = tmp_path.glob("*/events.jsonl")
    assert log.read_text().count('"fork_server_ready"') == 1
    replay(log.parent)


def run_wrongly(*arguments: str) -> str:
    """stderr of a command line that must end with status 2 and one line."""
    done = run([sys.executable, "-m", "elastic_ep.run", *arguments], 60)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def broken_copy(folder: Path) -> Path:
    folder.mkdir()
    for file in BUNDLED_MODEL.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


def test_wrong_flags() -> None:
    assert "is --ranks meant?" in run_wrongly("--rank", "3")


def test_missing_and_broken_checkpoints(tmp_path: Path) -> None:
    assert "config.json" in run_wrongly("--model", str(tmp_path / "nowhere"))
    folder = broken_copy(tmp_path / "truncated")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    message = run_wrongly("--model", str(folder))
    assert "model.safetensors" in message
    assert len(message.strip().splitlines()) == 1


def test_a_busy_port_starts_nothing(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        message = run_wrongly("--port", port, "--log-dir", str(tmp_path))
    assert f"cannot listen on 127.0.0.1:{port}" in message
    assert "--port 0" in message
