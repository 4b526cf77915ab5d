"""SIGKILL of the run process leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.kit.bound import Bound
from tests.kit.harness import alive, wait_until
from tests.kit.processes import stop

KIT = Path(__file__).parent.parent / "kit"
RANKS = 3
LIMIT_S = 5.0


def mentioning(directory: Path) -> list[str]:
    """Command lines in which the directory occurs."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            found.append(path.read_text().replace("\0", " "))
    return [line for line in found if str(directory) in line]


@pytest.mark.parametrize("stopped", [False, True], ids=["all run", "one rank stopped"])
@pytest.mark.parametrize("killed_first", [None, "server", "janitor", "agent"])
def test_nothing_outlives_the_run_process(directory: Path, stopped: bool, killed_first: str | None) -> None:
    with Bound(
        [sys.executable, str(KIT / "run_process.py"), str(directory), str(RANKS)],
        stdout=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        pids = json.loads(process.stdout.readline())
        everyone = [*pids["ranks"], pids["server"], pids["janitor"], pids["agent"]]
        assert len(pids["ranks"]) == RANKS
        assert all(map(alive, everyone))
        if stopped:
            stop(pids["ranks"][1])
        if killed_first:
            os.kill(pids[killed_first], signal.SIGKILL)
        process.kill()
    wait_until(lambda: not any(map(alive, everyone)), LIMIT_S, "no process left")
    wait_until(lambda: not mentioning(directory), LIMIT_S, "nor any other, such as a fork server that starts")
    wait_until(lambda: not directory.exists(), LIMIT_S, "the private directory removed")


STARTING = """
import asyncio, os, sys
from elastic_ep.host.fork_messages import LaunchOptions, SharedFiles
from elastic_ep.host.keeper import Keeper
async def main():
    options = LaunchOptions("rank_entries:main", ("rank_entries", "never_done"), sys.argv[1])
    async with Keeper(options, SharedFiles(0, 0)) as host:
        await host.start(lambda event: None)
asyncio.run(main())
"""


def test_a_fork_server_that_is_still_importing(directory: Path, tmp_path: Path) -> None:
    fifo = tmp_path / "importing"
    os.mkfifo(fifo)
    (tmp_path / "never_done.py").write_text(
        f"import time\nopen({str(fifo)!r}, 'w').close()\ntime.sleep(1000)\n"
    )
    with Bound(
        [sys.executable, "-c", STARTING, str(directory)],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{os.environ['PYTHONPATH']}"},
    ) as process:
        fifo.read_text()
        children = [child.pid for child in psutil.Process(process.pid).children(recursive=True)]
        assert len(children) == 3  # the janitor, the agent, the fork server
        process.kill()
    wait_until(lambda: not any(map(alive, children)), LIMIT_S, "no child left")
    wait_until(lambda: not mentioning(directory), LIMIT_S, "no process left")
    wait_until(lambda: not directory.exists(), LIMIT_S, "the private directory removed")
