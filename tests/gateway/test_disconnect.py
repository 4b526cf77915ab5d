"""A client that goes away takes its requests with it, within a second."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.gateway.conftest import Start
from tests.gateway.fakes import FakeBackend, FakeStream, never_ends

pytestmark = pytest.mark.anyio
DEADLINE_S = 1.0


async def _send(url: str, **body: object) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    host, port = url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    raw = json.dumps({"prompt": "A", "max_tokens": 100, **body}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(raw)}\r\n\r\n"
    writer.write(head.encode() + raw)
    await writer.drain()
    return reader, writer


async def _streams(backend: FakeBackend, count: int) -> list[FakeStream]:
    """The next streams of the backend, once every token they have is taken."""
    async with asyncio.timeout(5):
        streams = [await backend.arrived.get() for _ in range(count)]
        for stream in streams:
            await stream.idle.wait()
    return streams


@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("stream", [False, True])
async def test_disconnect_cancels(start: Start, stream: bool, n: int) -> None:
    backend = FakeBackend(reply=never_ends("The answer"))
    running = await start(backend)
    reader, writer = await _send(running.url, stream=stream, n=n)
    streams = await _streams(backend, n)
    if stream:
        assert b"200" in await reader.readline()
    assert not any(one.cancelled.is_set() for one in streams)
    writer.close()
    async with asyncio.timeout(DEADLINE_S):
        await asyncio.gather(*[one.cancelled.wait() for one in streams])
    await writer.wait_closed()
    assert b"client_disconnects_total 1.0" in running.metrics.render()


async def test_disconnect_before_the_first_token_cancels(start: Start) -> None:
    backend = FakeBackend(reply=lambda request: [])
    running = await start(backend)
    _, writer = await _send(running.url, stream=True)
    streams = await _streams(backend, 1)
    writer.close()
    async with asyncio.timeout(DEADLINE_S):
        await streams[0].cancelled.wait()
    await writer.wait_closed()


async def test_the_reset_of_a_connection_cancels(start: Start) -> None:
    backend = FakeBackend(reply=never_ends("The answer"))
    running = await start(backend)
    _, writer = await _send(running.url, stream=True)
    streams = await _streams(backend, 1)
    writer.transport.abort()
    async with asyncio.timeout(DEADLINE_S):
        await streams[0].cancelled.wait()


async def test_others_go_on(start: Start) -> None:
    backend = FakeBackend(reply=never_ends("The answer"))
    running = await start(backend)
    _, leaving = await _send(running.url, stream=True)
    [left] = await _streams(backend, 1)
    _, staying = await _send(running.url, stream=True)
    [stayed] = await _streams(backend, 1)
    leaving.close()
    async with asyncio.timeout(DEADLINE_S):
        await left.cancelled.wait()
    assert not stayed.cancelled.is_set()
    staying.close()
    async with asyncio.timeout(DEADLINE_S):
        await stayed.cancelled.wait()


async def test_closing_the_server_ends_what_still_runs(start: Start) -> None:
    backend = FakeBackend(reply=never_ends("The answer"))
    running = await start(backend)
    _, writer = await _send(running.url, stream=True)
    streams = await _streams(backend, 1)
    await running.server.close()
    assert streams[0].cancelled.is_set()
    writer.close()
