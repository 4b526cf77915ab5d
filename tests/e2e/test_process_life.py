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

import psutil
import pytest
from bench.bound import run
from bench.common import chat, http, server, status, until_full

from elastic_ep.problems import held_out
from elastic_ep.run import BUNDLED_MODEL

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
    async def stream_and_stop(url: str, pid: int) -> str:
        stamps: list[float] = []
        async with http() as session:
            task = asyncio.create_task(
                chat(session, url, held_out(1)[0].question, stamps=stamps, max_tokens=60, ignore_eos=True)
            )
            async with asyncio.timeout(30):
                while not stamps:
                    await asyncio.sleep(0.01)
            os.kill(pid, signal.SIGTERM)
            return await asyncio.wait_for(task, 30)

    with server(["--ranks", "2"], tmp_path) as running:
        processes, directory = family(running.process.pid), sockets_directory(running.process.pid)
        assert len(processes) >= 3
        text = asyncio.run(stream_and_stop(running.url, running.process.pid))
        assert text
        assert running.process.wait(30) == 0
        wait_gone(processes, directory, 5)
        assert running.events.read_text().count('"fork_server_ready"') == 1


def test_sigkill_of_the_run_process_leaves_nothing(tmp_path: Path) -> None:
    with server(["--ranks", "3"], tmp_path) as running:
        processes, directory = family(running.process.pid), sockets_directory(running.process.pid)
        os.kill(processes[-1].pid, signal.SIGSTOP)  # a stopped one must go, too
        running.process.kill()
        running.process.wait()
        wait_gone(processes, directory, 5)


def test_a_rank_that_keeps_dying_stays_failed_and_the_rest_serves(tmp_path: Path) -> None:
    async def kill_until_given_up(url: str) -> None:
        async with http() as session:
            async with asyncio.timeout(60):
                while True:
                    engine = (await status(session, url))["engines"][1]
                    if "gave up" in engine["reason"]:
                        break
                    if engine["pid"] and engine["state"] != "Failed":
                        with suppress(ProcessLookupError):
                            os.kill(engine["pid"], signal.SIGKILL)
                    await asyncio.sleep(0.005)
            assert engine["state"] == "Failed"
            assert engine["status"] == "dead"
            assert "--relaunch-limit 2" in engine["reason"]
            text = await chat(session, url, held_out(1)[0].question, temperature=0.0)
            assert text.endswith(f"#### {held_out(1)[0].answer}")

    with server(["--ranks", "3", "--relaunch-limit", "2"], tmp_path) as running:
        asyncio.run(kill_until_given_up(running.url))


@pytest.mark.parametrize("ranks", ["1", "5"])
def test_other_group_sizes_answer(tmp_path: Path, ranks: str) -> None:
    async def ask(url: str) -> str:
        async with http() as session:
            await until_full(session, url)
            return await chat(session, url, held_out(1)[0].question, temperature=0.0)

    with server(["--ranks", ranks], tmp_path) as running:
        assert asyncio.run(ask(running.url)).endswith(f"#### {held_out(1)[0].answer}")


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
    assert "--ranks 65 is out of range" in run_wrongly("--ranks", "65")
    assert "--port" in run_wrongly("--port", "70000")
    assert "unrecognized arguments" in run_wrongly("--rank", "3")


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
