"""A server under load, and what that costs it: streams, tokens so far, processor time, memory."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import cycle

import aiohttp
import psutil
from tests.kit.served import Server
from train.problems import held_out

CONCURRENT = 64
MAX_NEW = 160
_GENERATED = re.compile(r"^elastic_ep:generation_tokens_total(?:\{.*\})? (\S+)", re.MULTILINE)


@asynccontextmanager
async def under_load(
    session: aiohttp.ClientSession, *servers: Server, streams: int = CONCURRENT, problems: int = 512
) -> AsyncIterator[None]:
    """While the block runs, so many streams on each server, each with one problem after the other."""
    questions = [problem.question for problem in held_out(problems)]
    async with asyncio.TaskGroup() as tasks:
        running = [
            tasks.create_task(stream(session, target.url, cycle(questions[first:] + questions[:first])))
            for first in range(streams)
            for target in servers
        ]
        try:
            yield
        finally:
            for task in running:
                task.cancel()


def cpu_seconds(root: psutil.Process) -> tuple[float, float]:
    """(all, without the forward threads: the busiest thread of each rank)."""
    total, forward = 0.0, 0.0
    for process in [root, *root.children(recursive=True)]:
        threads = [thread.user_time + thread.system_time for thread in process.threads()]
        total += sum(threads)
        if process.pid != root.pid and process.ppid() != root.pid:  # a rank is a child of the fork server
            forward += max(threads)
    return total, total - forward


async def generated(session: aiohttp.ClientSession, url: str) -> float:
    async with session.get(f"{url}/metrics") as response:
        found = _GENERATED.search(await response.text())
    return float(found.group(1)) if found else 0.0


async def stream(session: aiohttp.ClientSession, url: str, questions: Iterator[str]) -> None:
    """One request after the other, without end."""
    for question in questions:
        body = {"model": "default", "messages": [{"role": "user", "content": question}], "temperature": 0.0}
        body |= {"max_tokens": MAX_NEW}
        async with session.post(f"{url}/v1/chat/completions", json=body) as response:
            response.raise_for_status()
            await response.read()


def pss_mb(target: Server) -> float:
    root = psutil.Process(target.process.pid)
    family = [root, *root.children(recursive=True)]
    return round(sum(process.memory_full_info().pss for process in family) / 1e6, 1)
