"""Streams to a group of several hosts, a fault under them, and what the event log says of it then."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import aiohttp
from train.problems import held_out

from tests.kit.hosts import Group
from tests.kit.served import Stamps, begun, chat, http, until_full

QUESTIONS = [problem.question for problem in held_out(6)]
Texts = list[str]
T = TypeVar("T")


async def answers(session: aiohttp.ClientSession, url: str, started: asyncio.Event | None = None) -> Texts:
    """To every question at once, half greedy, half sampled; `started` is set when all of them stream."""
    left = len(QUESTIONS)

    async def one(index: int) -> str:
        nonlocal left
        stamps = Stamps()
        how = {"temperature": 0.0} if index % 2 else {"temperature": 1.2, "seed": index}
        text = asyncio.create_task(
            chat(session, url, QUESTIONS[index], stamps=stamps, max_tokens=60, ignore_eos=True, **how)
        )
        await begun(text, stamps)
        left -= 1
        if started is not None and not left:
            started.set()
        return await text

    return list(await asyncio.gather(*(one(index) for index in range(len(QUESTIONS)))))


def undisturbed(url: str) -> Texts:
    """The texts without a fault."""

    async def all_of_them() -> Texts:
        async with http() as session:
            await until_full(session, url)
            return await answers(session, url)

    return asyncio.run(all_of_them())


async def with_fault(url: str, fault: Callable[[], object]) -> tuple[Texts, dict[int, int]]:
    """The texts of streams under which it strikes, and the ranks' incarnations before."""
    async with http() as session:
        before = await until_full(session, url)
        started = asyncio.Event()
        streams = asyncio.create_task(answers(session, url, started))
        await asyncio.wait_for(started.wait(), 60)
        await asyncio.to_thread(fault)
        texts = await asyncio.wait_for(streams, 120)
        return texts, {engine["id"]: engine["incarnation"] for engine in before["engines"]}


async def while_they_stream(url: str, until: Awaitable[T]) -> tuple[list[Texts], T]:
    """The texts of streams, wave upon wave until that is over and the last one has ended."""
    async with http() as session:
        awaited = asyncio.ensure_future(until)
        waves = []
        while not awaited.done():
            waves.append(await asyncio.wait_for(answers(session, url), 120))
        return waves, await awaited


async def grown(url: str, ranks: int) -> None:
    """When so many serve."""
    async with asyncio.timeout(120), http() as session:
        while len((await until_full(session, url))["engines"]) < ranks:
            pass


async def full(url: str, beyond: dict[int, int]) -> dict[str, Any]:
    async with http() as session:
        return await until_full(session, url, beyond=beyond)


def notes(hosts: Group, name: str) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in hosts.server.events.read_text().splitlines()]
    return [line for line in lines if line.get("note") == name]


def views(hosts: Group) -> list[set[int]]:
    """Which ranks each view that was published had."""
    found = []
    for line in map(json.loads, hosts.server.events.read_text().splitlines()):
        for effect in line.get("effects", ()) if line.get("machine") == "membership" else ():
            if effect[0] == "Publish":
                body = effect[1][2] if effect[1][0] == "Commit" else effect[1]
                if body[0] == "View":
                    found.append({seat[1] for seat in body[2]})
    return found
