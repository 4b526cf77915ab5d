"""Streams of long prompts, one after the other, and ranks that are killed under them."""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from tests.kit.served import MODEL, Server, counters, http, status, until_full

from bench.kit.long_prompts import long_prompt

DEADLINE_S = 240.0
_POLL_S = 0.005


@dataclass(frozen=True, slots=True, order=True)
class Ask:
    """One request: the prompt of this number."""

    number: int
    seeded: bool = False

    @property
    def sampling(self) -> dict[str, Any]:
        return {"temperature": 1.0, "seed": self.number} if self.seeded else {"temperature": 0.0}


def asks(first: int = 0) -> Iterator[Ask]:
    """Without end, half greedy, half sampled; no prompt twice."""
    return (Ask(number, seeded=number % 2 == 1) for number in itertools.count(first))


@dataclass(frozen=True, slots=True)
class Answer:
    text: str
    prompt_tokens: int
    generated: int
    first_s: float
    """Until there was text."""


async def complete(
    session: aiohttp.ClientSession, url: str, prompt: list[int], heard: Callable[[], None], **fields: Any
) -> Answer:
    """`heard` is called with each piece of text. Raises RuntimeError on any error that a client would see."""
    body = {"model": MODEL, "prompt": prompt, "stream": True, "ignore_eos": True, **fields}
    body["stream_options"] = {"include_usage": True}
    asked = time.monotonic()
    parts: list[str] = []
    first_s, usage = float("nan"), None
    async with session.post(f"{url}/v1/completions", json=body) as response:
        if response.status != 200:
            raise RuntimeError(f"status {response.status}: {await response.text()}")
        async for line in response.content:
            if not line.startswith(b"data: {"):
                continue
            event = json.loads(line[6:])
            if "error" in event:
                raise RuntimeError(f"error in the stream: {event['error']}")
            usage = event.get("usage") or usage
            for choice in event["choices"]:
                if choice["text"]:
                    if not parts:
                        first_s = time.monotonic() - asked
                    parts.append(choice["text"])
                    heard()
    if usage is None:
        raise RuntimeError("the stream ended before its usage")
    return Answer("".join(parts), usage["prompt_tokens"], usage["completion_tokens"], first_s)


@dataclass(eq=False, slots=True)
class Stream:
    """One request under way. `last` is when its last piece of text came, CLOCK_MONOTONIC seconds; 0 before any."""

    last: float = 0.0

    def heard(self) -> None:
        self.last = time.monotonic()


@dataclass
class Load:
    """`at_once` streams, each of which takes the next of `asks` when it is over, while `gate` is open."""

    target: Server
    asks: Iterator[Ask]
    prompt_tokens: int
    max_tokens: int
    at_once: int
    answers: dict[Ask, Answer] = field(default_factory=dict)
    errors: list[str] = field(default_factory=list)
    under_way: set[Stream] = field(default_factory=set)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    stopping: bool = False

    async def run(self, session: aiohttp.ClientSession) -> None:
        self.gate.set()
        await asyncio.gather(*(self._one_after_the_other(session) for _ in range(self.at_once)))

    def stop(self) -> None:
        """Those under way end."""
        self.stopping = True
        self.gate.set()

    async def _one_after_the_other(self, session: aiohttp.ClientSession) -> None:
        while True:
            await self.gate.wait()
            if self.stopping or (ask := next(self.asks, None)) is None:
                return
            stream = Stream()
            self.under_way.add(stream)
            try:
                self.answers[ask] = await complete(
                    session,
                    self.target.url,
                    long_prompt(ask.number, self.prompt_tokens),
                    stream.heard,
                    max_tokens=self.max_tokens,
                    **ask.sampling,
                )
            except (RuntimeError, aiohttp.ClientError, TimeoutError) as error:
                self.errors.append(f"{ask}: {error!r}")
            finally:
                self.under_way.discard(stream)

    async def until_all_heard(self, since: float) -> None:
        """Each stream that is under way has had text since then, or is over."""
        streams = tuple(self.under_way)
        async with asyncio.timeout(DEADLINE_S):
            while any(stream in self.under_way and stream.last <= since for stream in streams):
                await asyncio.sleep(_POLL_S)


async def answered(target: Server, wanted: Iterable[Ask], options: Any) -> Load:
    """A load of these, to its end."""
    load = Load(target, iter(wanted), options.prompt_tokens, options.max_tokens, options.streams)
    async with http() as session:
        await load.run(session)
    return load


async def kill(session: aiohttp.ClientSession, load: Load, rank: int, *, counted: bool) -> dict[str, Any]:
    """SIGKILL. `counted`: no prompt is new meanwhile, so that what is computed besides next tokens is computed again."""
    url = load.target.url
    if counted:
        load.gate.clear()
        await load.until_all_heard(0.0)
    before = await counters(session, url)
    engine = (await status(session, url))["engines"][rank]
    streams = len(load.under_way)
    at = time.monotonic()
    os.kill(engine["pid"], signal.SIGKILL)
    told: dict[str, Any] = {"rank": rank, "incarnation": engine["incarnation"], "at_ns": int(at * 1e9)}
    told |= {"streams": streams, "counted": counted}
    if counted:
        await load.until_all_heard(at)
        since = await counters(session, url)
        since.subtract(before)
        load.gate.set()
        told["moved"] = since["requests_replayed"]
        if "prefix_cache_queries" in before:
            told["computed_again"] = since["prefix_cache_queries"] - since["prefix_cache_hits"]
            told["pages_fetched"] = since["shelf_pages_fetched"]
    await until_full(session, url, DEADLINE_S, beyond={rank: engine["incarnation"]})
    told["full_strength_s"] = round(time.monotonic() - at, 3)
    return told


async def with_kills(target: Server, options: Any) -> tuple[Load, list[dict[str, Any]]]:
    """`kills` of them, every rank in turn, from when all streams have text on; in every other round counted ones."""
    load = Load(target, asks(), options.prompt_tokens, options.max_tokens, options.streams)
    struck = []
    async with http() as session:
        running = asyncio.create_task(load.run(session))
        async with asyncio.timeout(DEADLINE_S):
            while len(load.under_way) < load.at_once:
                await asyncio.sleep(_POLL_S)
        await load.until_all_heard(0.0)
        await asyncio.sleep(options.settle)
        for number in range(options.kills):
            counted = number // options.ranks % 2 == 0
            struck.append(await kill(session, load, number % options.ranks, counted=counted))
            print(f"\r{number + 1}/{options.kills} kills, {len(load.errors)} errors ", end="", flush=True)
            await asyncio.sleep(options.settle)
        load.stop()
        await running
    print()
    return load, struck
