"""Spans of requests: what happened when, no text, a client's own trace, and a collector that is away."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SpanExporter
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from elastic_ep.gateway.app import Server, create_app, serve
from elastic_ep.gateway.traces import GIVEN_UP, SPAN, Traces, TracesUnavailable, to_endpoint
from elastic_ep.group.metrics import ChoiceLife, Metrics
from tests.gateway.conftest import settings
from tests.gateway.fakes import MODEL, FakeBackend, never_ends, sample_text, says

pytestmark = pytest.mark.anyio
DEADLINE_S = 20.0
PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


async def traced(traces: Traces, backend: FakeBackend | None = None) -> Server:
    backend = backend or FakeBackend(reply=says("Secret words."))
    app = create_app(backend, settings(), sample_text(), Metrics(), sample_text, traces=traces)
    return await serve(app, "127.0.0.1", 0, grace_s=0.1)


async def ask(url: str, **fields: Any) -> int:
    body = {"model": MODEL, "prompt": "Secret prompt", "max_tokens": 9, **fields}
    async with (
        aiohttp.ClientSession(headers={"traceparent": PARENT}) as http,
        http.post(f"{url}/v1/completions", json=body) as response,
    ):
        await response.read()
        return response.status


async def spans_of(exporter: InMemorySpanExporter, traces: Traces, **fields: Any) -> list[ReadableSpan]:
    server = await traced(traces)
    assert await ask(server.url, **fields) == 200
    await server.close()
    return list(exporter.get_finished_spans())


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.mark.parametrize("fields", [{}, {"stream": True}, {"n": 3}], ids=str)
async def test_a_span_for_each_choice(fields: dict[str, Any]) -> None:
    exporter = InMemorySpanExporter()
    spans = await spans_of(exporter, Traces(exporter, MODEL, "1"), **fields)
    assert len(spans) == fields.get("n", 1)
    for span in spans:
        assert span.name == SPAN
        assert [event.name for event in span.events] == ["assigned", "first_token", "done"]
        assert span.start_time is not None
        assert span.end_time is not None
        times = [span.start_time, *(event.timestamp for event in span.events), span.end_time]
        assert times == sorted(times)
        attributes = dict(span.attributes or {})
        assert attributes["gen_ai.response.model"] == MODEL
        assert attributes["gen_ai.request.max_tokens"] == 9
        assert 0 < int(str(attributes["gen_ai.usage.completion_tokens"])) <= 9
        assert span.context is not None
        assert f"{span.context.trace_id:032x}" == PARENT.split("-")[1]
        assert span.parent is not None
        assert f"{span.parent.span_id:016x}" == PARENT.split("-")[2]
        assert "ecret" not in json.dumps(json.loads(span.to_json()))


async def test_what_moved_is_told_and_what_failed_is_an_error() -> None:
    exporter = InMemorySpanExporter()
    traces = Traces(exporter, MODEL, "1")
    life = ChoiceLife(1.0, 0.5, 2.0, 5.0, 6.0, prompt=3, generated=4, max_tokens=9, moved_s=(3.0, 4.0))
    traces.ended("length", life)
    traces.ended("abort", ChoiceLife(1.0, None, None, None, 6.0, prompt=3, generated=0, max_tokens=9))
    await asyncio.to_thread(traces._provider.shutdown)
    moved, failed = exporter.get_finished_spans()
    assert moved.start_time is not None
    told = [(event.name, round((event.timestamp - moved.start_time) / 1e9, 3)) for event in moved.events]
    assert told == [("assigned", 0.5), ("moved", 2.0), ("moved", 3.0), ("first_token", 1.0), ("done", 5.0)]
    assert [event.name for event in failed.events] == ["done"]
    assert (moved.status.is_ok, failed.status.is_ok) == (True, False)


@pytest.mark.parametrize("path", ["completions", "chat/completions", "responses", "messages"])
@pytest.mark.parametrize("stream", [False, True])
async def test_a_choice_whose_client_leaves_has_one_too(path: str, stream: bool) -> None:
    """With the time at which a rank had it, and the tokens that were made, as far as it got."""
    exporter, backend = InMemorySpanExporter(), FakeBackend(reply=never_ends("Secret words."))
    server = await traced(Traces(exporter, MODEL, "1"), backend)
    bodies: dict[str, dict[str, Any]] = {
        "completions": {"prompt": "Secret prompt", "n": 2},
        "responses": {"input": "Secret prompt"},
    }
    asked = bodies.get(path, {"messages": [{"role": "user", "content": "Secret prompt"}]})
    limit = "max_output_tokens" if path == "responses" else "max_tokens"
    body = {"model": MODEL, limit: 90, "stream": stream, **asked}
    choices = 2 if path == "completions" else 1
    async with asyncio.timeout(DEADLINE_S):
        async with aiohttp.ClientSession(headers={"traceparent": PARENT}) as http:
            asking = asyncio.create_task(_read(http, f"{server.url}/v1/{path}", body))
            streams = [await backend.arrived.get() for _ in range(choices)]
            for one in streams:
                await one.idle.wait()
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            for one in streams:
                await one.cancelled.wait()
        await server.close()
    spans = exporter.get_finished_spans()
    assert len(spans) == choices
    for span in spans:
        assert [event.name for event in span.events] == ["assigned", "first_token", "done"]
        attributes = dict(span.attributes or {})
        assert attributes["gen_ai.response.finish_reasons"] == (GIVEN_UP,)
        assert attributes["gen_ai.usage.completion_tokens"]
        assert (span.status.is_ok, span.status.is_unset) == (True, True)
        assert span.context is not None
        assert f"{span.context.trace_id:032x}" == PARENT.split("-")[1]
        assert "ecret" not in json.dumps(json.loads(span.to_json()))


async def _read(http: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> None:
    async with http.post(url, json=body) as response:
        await response.read()


@pytest.fixture
async def collector(
    anyio_backend: str,
) -> AsyncIterator[tuple[str, asyncio.Queue[ExportTraceServiceRequest]]]:
    """The URL of one that takes OTLP over HTTP, and what it got."""
    got: asyncio.Queue[ExportTraceServiceRequest] = asyncio.Queue()

    async def take(request: web.Request) -> web.Response:
        got.put_nowait(ExportTraceServiceRequest.FromString(await request.read()))
        return web.Response(content_type="application/x-protobuf")

    app = web.Application()
    app.router.add_post("/v1/traces", take)
    server = await serve(app, "127.0.0.1", 0, grace_s=0.1)
    yield f"{server.url}/v1/traces", got
    await server.close()


async def test_a_collector_gets_them_at_the_latest_when_the_server_ends(
    collector: tuple[str, asyncio.Queue[ExportTraceServiceRequest]],
) -> None:
    url, got = collector
    server = await traced(await asyncio.to_thread(to_endpoint, url, MODEL, "1.2"))
    assert await ask(server.url) == 200
    await server.close()
    async with asyncio.timeout(DEADLINE_S):
        (sent,) = (await got.get()).resource_spans
    assert [span.name for scope in sent.scope_spans for span in scope.spans] == [SPAN]
    named = {attribute.key: attribute.value.string_value for attribute in sent.resource.attributes}
    assert (named["service.name"], named["service.version"]) == ("elastic_ep", "1.2")


class Away(SpanExporter):
    """A collector that takes nothing, and does not say so."""

    def export(self, spans: Any) -> Any:
        raise ConnectionError


async def test_a_collector_that_is_away_is_nobodys_affair() -> None:
    server = await traced(Traces(Away(), MODEL, "1"))
    for _ in range(3):
        assert await ask(server.url) == 200
    await server.close()


class Hangs(SpanExporter):
    """A collector that takes a connection, and then nothing."""

    def __init__(self) -> None:
        self.asked, self.free = threading.Event(), threading.Event()

    def export(self, spans: Any) -> Any:
        self.asked.set()
        self.free.wait()


async def test_a_collector_that_hangs_does_not_hold_up_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor what comes after the server: the loop joins the threads of its executor."""
    monkeypatch.setattr("elastic_ep.gateway.traces.SEND_S", 0.2)
    exporter = Hangs()
    try:
        async with asyncio.timeout(DEADLINE_S):
            server = await traced(Traces(exporter, MODEL, "1"))
            assert await ask(server.url) == 200
            await server.close()
            assert await asyncio.to_thread(exporter.asked.wait, DEADLINE_S)
            await asyncio.get_running_loop().shutdown_default_executor()
    finally:
        exporter.free.set()


@pytest.mark.parametrize("endpoint", ["collector:4317", "grpc://collector", ""])
def test_what_is_no_url_is_refused(endpoint: str) -> None:
    with pytest.raises(TracesUnavailable, match="give http://"):
        to_endpoint(endpoint, MODEL, "1")
