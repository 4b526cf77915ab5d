"""One and the same load on any server with /v1/completions: so many streams, each followed by a new one when it ends."""

from __future__ import annotations

import asyncio
import json
import random
import time
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import aiohttp
from tests.kit.served import http, summary


@dataclass(frozen=True, slots=True)
class Case:
    streams: int
    prompt: int
    """Tokens."""
    tokens: int
    """That each stream gives."""

    def __str__(self) -> str:
        return f"{self.streams} streams of {self.prompt} + {self.tokens}"


@dataclass(slots=True)
class _Stream:
    began: float
    stamps: list[float] = field(default_factory=list)
    tokens: int = 0


async def put_on(
    url: str, model: str, case: Case, *, vocabulary: int, warm_s: float, seconds: float
) -> dict[str, Any]:
    """Raises RuntimeError on any error that a client sees. Prompts are random lists of tokens, none twice."""
    ended: list[_Stream] = []
    random_ = random.Random(f"{case}")
    until = time.monotonic() + warm_s + seconds

    async def client(session: aiohttp.ClientSession) -> None:
        while time.monotonic() < until:
            prompt = [random_.randrange(vocabulary) for _ in range(case.prompt)]
            ended.append(await _one(session, url, model, prompt, case.tokens))

    async with http() as session:
        tasks = [asyncio.create_task(client(session)) for _ in range(case.streams)]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
    return _figures(case, ended, until - seconds, until)


async def _one(
    session: aiohttp.ClientSession, url: str, model: str, prompt: list[int], tokens: int
) -> _Stream:
    stream = _Stream(time.monotonic())
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    async with session.post(f"{url}/v1/completions", json=body) as response:
        if response.status != 200:
            raise RuntimeError(f"{response.status}: {(await response.text())[:300]}")
        async for line in response.content:
            data = line.removeprefix(b"data:").strip()
            if not data or data == b"[DONE]":
                continue
            event = json.loads(data)
            if "error" in event:
                raise RuntimeError(str(event["error"])[:300])
            if event.get("choices"):
                stream.stamps.append(time.monotonic())
            if event.get("usage"):
                stream.tokens = event["usage"]["completion_tokens"]
    if stream.tokens != tokens:
        raise RuntimeError(f"a stream of {tokens} tokens had {stream.tokens}")
    return stream


def _figures(case: Case, streams: list[_Stream], begin: float, end: float) -> dict[str, Any]:
    """A stream's tokens are spread evenly over its pieces of text, of which only those in the window count."""
    counted, gaps, firsts = 0.0, [], []
    for stream in streams:
        inside = sum(begin <= stamp < end for stamp in stream.stamps)
        counted += stream.tokens * inside / max(1, len(stream.stamps))
        gaps += [1000 * (b - a) for a, b in pairwise(stream.stamps) if begin <= a and b < end]
        if stream.stamps and begin <= stream.began < end:
            firsts.append(1000 * (stream.stamps[0] - stream.began))
    return {
        "streams": case.streams,
        "prompt_tokens": case.prompt,
        "tokens": case.tokens,
        "tokens_per_s": round(counted / (end - begin), 1),
        "first_token_ms": summary(firsts),
        "gap_ms": summary(gaps),
    }
