"""A run process that gets killed by a test: prints one line of JSON, then waits."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import anyio

from elastic_ep.wire.messages import Member
from tests.kit.harness import running


async def main(directory: Path, ranks: int) -> None:
    async with running(directory) as run:
        pids = [(await run.up(Member(rank, 1)))["pid"] for rank in range(ranks)]
        host = run.launcher
        others = {"server": host.server_pid, "janitor": host.janitor.pid, "agent": host.agent_pid}
        print(json.dumps({"ranks": pids, **others}), flush=True)
        await anyio.sleep_forever()


anyio.run(main, Path(sys.argv[1]), int(sys.argv[2]))
