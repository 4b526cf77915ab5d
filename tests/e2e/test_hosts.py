"""Two hosts of two ranks: one dies, falls silent or loses its agent under streams, and no client sees it."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import aiohttp
import pytest
import zmq
from train.problems import held_out

from tests.kit.harness import title
from tests.kit.hosts import Group, group
from tests.kit.served import Stamps, begun, chat, http, until_full

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(180)]

QUESTIONS = [problem.question for problem in held_out(6)]
OTHER = "127.0.0.2"
Texts = list[str]


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Group]:
    """Every test leaves both of them there."""
    with group(tmp_path_factory.mktemp("hosts"), arguments=["--event-log", "full"]) as running:
        yield running


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


@pytest.fixture(scope="module")
def expected(hosts: Group) -> Texts:
    async def undisturbed() -> Texts:
        async with http() as session:
            await until_full(session, hosts.server.url)
            return await answers(session, hosts.server.url)

    return asyncio.run(undisturbed())


async def with_fault(url: str, fault: Callable[[], object]) -> tuple[Texts, dict[int, int]]:
    """The texts of streams under which it strikes, and the ranks' incarnations before."""
    async with http() as session:
        before = await until_full(session, url)
        started = asyncio.Event()
        streams = asyncio.create_task(answers(session, url, started))
        await asyncio.wait_for(started.wait(), 60)
        fault()
        texts = await asyncio.wait_for(streams, 120)
        return texts, {engine["id"]: engine["incarnation"] for engine in before["engines"]}


async def full(url: str, beyond: dict[int, int]) -> dict[str, Any]:
    async with http() as session:
        return await until_full(session, url, beyond=beyond)


def of_the_other(incarnations: dict[int, int]) -> dict[int, int]:
    return {rank: incarnation for rank, incarnation in incarnations.items() if rank >= 2}


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


def test_a_killed_host_costs_no_token_and_comes_back(hosts: Group, expected: Texts) -> None:
    lost = hosts.hosts[OTHER]
    earlier = len(views(hosts))
    texts, before = asyncio.run(with_fault(hosts.server.url, lost.kill))
    assert texts == expected
    seen = views(hosts)[earlier:]
    assert {0, 1} in seen
    assert not [view for view in seen if len(view) == 3], "both ranks of the host are lost in one view"
    hosts.start(OTHER)
    now = asyncio.run(full(hosts.server.url, of_the_other(before)))
    assert {engine["id"]: engine["incarnation"] for engine in now["engines"] if engine["id"] < 2} == {
        0: before[0],
        1: before[1],
    }


def test_a_killed_agent_of_a_host_costs_nothing(hosts: Group, expected: Texts) -> None:
    """Its ranks live, rows are carried again by the next one, and that one tells of a killed rank."""
    host = hosts.hosts[OTHER]
    agent = next(pid for pid in host.pids if "host agent" in title(pid))
    texts, before = asyncio.run(with_fault(hosts.server.url, lambda: os.kill(agent, signal.SIGKILL)))
    assert texts == expected
    rank = next(pid for pid in host.pids if "rank 3." in title(pid))
    texts, _ = asyncio.run(with_fault(hosts.server.url, lambda: os.kill(rank, signal.SIGKILL)))
    assert texts == expected
    asyncio.run(full(hosts.server.url, {3: before[3]}))


def test_a_host_that_falls_silent_is_lost_and_ends_its_ranks_before_they_are_back(
    hosts: Group, expected: Texts
) -> None:
    host = hosts.hosts[OTHER]
    ranks = [pid for pid in host.pids if ": rank " in title(pid)]
    assert len(ranks) == 2
    texts, before = asyncio.run(with_fault(hosts.server.url, lambda: host.signal(signal.SIGSTOP)))
    assert texts == expected
    host.signal(signal.SIGCONT)
    host.lines.await_line("not heard of for too long|taken this host for dead")
    asyncio.run(full(hosts.server.url, of_the_other(before)))
    assert not set(ranks) & set(host.pids)


def test_who_does_not_have_the_key_is_refused_and_counted(hosts: Group, expected: Texts) -> None:
    address, _, port = hosts.join.rpartition(":")
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    socket = context.socket(zmq.DEALER)
    public, secret = zmq.curve_keypair()
    socket.curve_serverkey, socket.curve_publickey, socket.curve_secretkey = public, public, secret
    socket.connect(f"tcp://{address}:{port}")
    hosts.lines.await_line("without the group's key is refused")
    context.destroy(linger=0)
    texts, _ = asyncio.run(with_fault(hosts.server.url, lambda: None))
    assert texts == expected
