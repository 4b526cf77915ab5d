"""Ranks killed under load: the streams, the signals, and whether any text came out another."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import time
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from tests.kit.served import Server, chat, http, status, until_full

STREAMS = 64
SETTLE_S = 1.5
JOINER_STATES = ("Launching", "InitCUDA", "InitDist", "Joining")


@dataclass(frozen=True)
class Case:
    """One disturbance: these ranks, this signal; then the replacement of the first one in `joiner_state`."""

    ranks: tuple[int, ...]
    stop: bool = False
    joiner_state: str | None = None
    instead: int | None = None
    """The rank that is killed then in place of the replacement."""


@dataclass
class Load:
    """Streams that go on until told; every result by (prompt, mode)."""

    server: Server
    questions: list[str]
    texts: dict[tuple[int, str], set[str]] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    finished: int = 0
    streams: list[list[float]] = field(default_factory=list)
    """When each piece of a stream's text came, CLOCK_MONOTONIC seconds."""
    at_once: int = STREAMS
    stopping: bool = False

    @property
    def stamps(self) -> list[float]:
        return sorted(itertools.chain.from_iterable(self.streams))

    async def run(self, session: aiohttp.ClientSession, rounds: int | None) -> None:
        """`rounds` times all questions, or until `stopping`."""
        jobs = itertools.chain.from_iterable(
            ((index, mode) for index in range(len(self.questions)) for mode in ("greedy", "sampled"))
            for _ in (range(rounds) if rounds else itertools.count())
        )
        await asyncio.gather(*(self._worker(session, jobs) for _ in range(self.at_once)))

    async def _worker(self, session: aiohttp.ClientSession, jobs: Any) -> None:
        for index, mode in jobs:
            if self.stopping:
                return
            fields = {"temperature": 0.0} if mode == "greedy" else {"temperature": 1.0, "seed": index}
            stamps: list[float] = []
            self.streams.append(stamps)
            try:
                text = await chat(
                    session,
                    self.server.url,
                    self.questions[index],
                    stamps=stamps,
                    max_tokens=160,
                    **fields,
                )
            except (RuntimeError, aiohttp.ClientError, TimeoutError) as error:
                self.errors.append(f"{mode} {index}: {error!r}")
                continue
            self.texts.setdefault((index, mode), set()).add(text)
            self.finished += 1


async def strike(session: aiohttp.ClientSession, url: str, case: Case) -> dict[str, Any]:
    """Do what the case says; when each signal was sent, CLOCK_MONOTONIC nanoseconds."""
    before = {engine["id"]: engine for engine in (await status(session, url))["engines"]}
    sent = []
    for rank in case.ranks:
        sent.append({"rank": rank, "incarnation": before[rank]["incarnation"], "at_ns": time.monotonic_ns()})
        os.kill(before[rank]["pid"], signal.SIGSTOP if case.stop else signal.SIGKILL)
    joiner = None
    if case.joiner_state:
        joiner = await strike_joiner(session, url, before[case.ranks[0]], case.joiner_state, case.instead)
    return {
        "ranks": case.ranks,
        "stop": case.stop,
        "joiner_state": case.joiner_state,
        "instead": case.instead,
        "sent": sent,
        "joiner": joiner,
    }


async def strike_joiner(
    session: aiohttp.ClientSession, url: str, old: dict[str, Any], state: str, instead: int | None
) -> dict[str, Any]:
    """Kill the replacement, or rank `instead`, when it is seen in `state` (or the first time it is seen past it)."""
    order = [*JOINER_STATES, "Serving"]
    limit = time.monotonic() + 30
    while time.monotonic() < limit:
        engines = (await status(session, url))["engines"]
        engine = engines[old["id"]]
        newer = engine["incarnation"] > old["incarnation"] and engine["state"] in order
        if newer and engine["pid"] and order.index(engine["state"]) >= order.index(state):
            victim = engine if instead is None else engines[instead]
            at_ns = time.monotonic_ns()
            os.kill(victim["pid"], signal.SIGKILL)
            told = {name: victim[name] for name in ("id", "incarnation")}
            return {"seen_state": engine["state"], **told, "at_ns": at_ns}
        await asyncio.sleep(0)
    raise TimeoutError(f"no replacement of rank {old['id']} within 30 s")


async def disturbed_run(
    target: Server, questions: list[str], cases: list[Case], at_once: int = STREAMS
) -> tuple[Load, list[dict[str, Any]]]:
    load = Load(target, questions, at_once=at_once)
    struck = []
    async with http() as session:
        running = asyncio.create_task(load.run(session, None))
        await asyncio.sleep(3.0)
        for number, case in enumerate(cases):
            struck.append(await strike(session, target.url, case))
            beyond = {s["rank"]: s["incarnation"] for s in struck[-1]["sent"]}
            if case.instead is not None:
                beyond[case.instead] = struck[-1]["joiner"]["incarnation"]
            await until_full(session, target.url, beyond=beyond)
            print(
                f"\r{number + 1}/{len(cases)} kills, {load.finished} streams finished, {len(load.errors)} errors ",
                end="",
            )
            await asyncio.sleep(SETTLE_S)
        load.stopping = True
        await running
    print()
    return load, struck


async def reference_run(target: Server, questions: list[str]) -> Load:
    load = Load(target, questions)
    async with http() as session:
        await load.run(session, 1)
    return load


def compare(load: Load, reference: Load) -> dict[str, Any]:
    different = [
        f"{mode} {index}"
        for (index, mode), texts in sorted(load.texts.items())
        if texts != reference.texts.get((index, mode), set())
    ]
    return {
        "streams_finished": load.finished,
        "failed_requests": len(load.errors),
        "errors": load.errors[:20],
        "texts_compared": len(load.texts),
        "texts_different": different,
    }
