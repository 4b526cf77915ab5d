from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

import aiohttp
import pytest
from pydantic._internal._generate_schema import GenerateSchema

import elastic_ep
from elastic_ep.gateway import text_worker
from elastic_ep.gateway.app import READING, Server, create_app, serve
from elastic_ep.gateway.prepared import prepare
from elastic_ep.gateway.settings import ApiSettings
from elastic_ep.gateway.text.tokenizer import ChatTokenizer
from elastic_ep.gateway.text_worker import TextWorker
from elastic_ep.group.metrics import Metrics
from tests.gateway.fakes import END, MODEL, FakeBackend, sample_text
from tests.kit.text_processes import TextProcesses
from tests.loop_plugin import not_held_against_it


@dataclass(frozen=True)
class Running:
    """A server on a loopback port and a client for it."""

    url: str
    backend: FakeBackend
    metrics: Metrics
    http: aiohttp.ClientSession
    server: Server
    worker: TextWorker

    async def post(self, path: str, body: Any) -> tuple[int, Any]:
        async with self.http.post(self.url + path, json=body) as response:
            return response.status, await response.json()


Start = Callable[..., Coroutine[Any, Any, Running]]


@pytest.fixture(scope="session")
def text_processes() -> Iterator[TextProcesses]:
    processes = TextProcesses()
    yield processes
    processes.close()


@pytest.fixture(autouse=True)
def text_processes_are_forked(monkeypatch: pytest.MonkeyPatch, text_processes: TextProcesses) -> None:
    """Not those of test_reading.py whose start is what is tested."""
    monkeypatch.setattr(text_worker, "_spawn", text_processes.start)


_PREPARED: set[ApiSettings] = set()
_OURS = str(Path(elastic_ep.__file__).parent)


@pytest.fixture(scope="session", autouse=True)
def usual_bodies() -> None:
    """As a server has them before its loop runs."""
    prepare(settings())


@pytest.fixture(autouse=True)
def no_schema_is_made_on_a_loop(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Pydantic takes tens of milliseconds for each: `prepare` makes them all before a loop runs, or on a thread."""
    made: list[str] = []
    generate = GenerateSchema.generate_schema

    def noted(self: GenerateSchema, kind: Any) -> Any:
        if asyncio._get_running_loop() is not None and (where := _by_us(sys._getframe(1))):
            made.append(f"{kind} at {where}")
        return generate(self, kind)

    monkeypatch.setattr(GenerateSchema, "generate_schema", noted)
    yield
    assert not made, f"a schema was made on an event loop: {made[:3]}"


def _by_us(frame: FrameType | None) -> str:
    """Where the product asked for it; empty: it did not, but a client that a test uses."""
    while frame is not None:
        if frame.f_code.co_filename.startswith(_OURS):
            return f"{frame.f_code.co_filename}:{frame.f_lineno}"
        frame = frame.f_back
    return ""


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def settings(**changes: Any) -> ApiSettings:
    values: dict[str, Any] = {
        "model_name": MODEL, "max_model_len": 256, "vocab_size": 512, "version": "0.0", "model_eos_token_ids": (END,),
    }  # fmt: skip
    return ApiSettings(**(values | changes))


async def served_once(
    ask: Callable[[str], Awaitable[None]], backend: FakeBackend, text: ChatTokenizer, **changes: Any
) -> None:
    """`ask` of a server: clients import and make much at their first request. For a loop that nobody watches."""
    chosen = settings(**changes)
    prepare(chosen)
    app = create_app(backend, chosen, text, Metrics(), sample_text)
    server = await serve(app, "127.0.0.1", 0, grace_s=0.1)
    try:
        await ask(server.url)
    finally:
        await server.close()


@pytest.fixture
async def start(anyio_backend: str, request: pytest.FixtureRequest) -> AsyncIterator[Start]:
    """Starts servers: `await start(backend, text, **settings)`. The process for large bodies has the usual text."""
    closing = []

    async def begin(
        backend: FakeBackend | None = None, text: ChatTokenizer | None = None, **changes: Any
    ) -> Running:
        backend = backend or FakeBackend()
        metrics = Metrics()
        chosen = settings(**changes)
        if chosen not in _PREPARED:
            with not_held_against_it(request.config):
                await asyncio.to_thread(prepare, chosen)
                await asyncio.sleep(0)
            _PREPARED.add(chosen)
        app = create_app(backend, chosen, text or sample_text(), metrics, sample_text)
        server = await serve(app, "127.0.0.1", 0, grace_s=0.1)
        http = aiohttp.ClientSession()
        closing.append((server, http))
        return Running(server.url, backend, metrics, http, server, app[READING].worker)

    yield begin
    for server, http in closing:
        await http.close()
        await server.close()
