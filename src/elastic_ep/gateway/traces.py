"""Spans of requests for OpenTelemetry, one a choice, sent when it has ended. Needs the extra `otel`.

Names are vLLM's and those of OpenTelemetry's conventions for generative AI. Nothing of a text is in them. A client's
`traceparent` is the parent. Spans wait in a bounded queue for a thread that sends them: a collector that is slow or
away costs spans, and makes nobody wait.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import suppress
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from aiohttp import web

from elastic_ep.gateway.errors import Handler
from elastic_ep.group.metrics import ChoiceLife

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import SpanExporter

SPAN = "llm_request"
GIVEN_UP = "cancelled"
"""The reason of a choice whose client has left, or of which another choice of its request has failed."""
SEND_S = 3.0
"""For one batch of spans, and at the end for all that is left."""
_PARENT: ContextVar[Any] = ContextVar("parent of this request's spans", default=None)


class TracesUnavailable(Exception):
    """The message says what to do."""


class Traces:
    def __init__(self, exporter: SpanExporter, model_name: str, version: str) -> None:
        """Raises `TracesUnavailable`."""
        try:
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace import TracerProvider
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
        except ImportError as error:
            raise TracesUnavailable(_MISSING) from error
        resource = Resource.create({"service.name": "elastic_ep", "service.version": version})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(BatchSpanProcessor(exporter, export_timeout_millis=SEND_S * 1000))
        self._tracer = self._provider.get_tracer("elastic_ep", version)
        self._propagator = TraceContextTextMapPropagator()
        self._model = model_name

    def middleware(self) -> Any:
        @web.middleware
        async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
            _PARENT.set(self._propagator.extract(request.headers))
            return await handler(request)

        return middleware

    def ended(self, reason: str, life: ChoiceLife) -> None:
        """A choice has ended: from where its request was handled."""
        to_ns = _wall_clock()
        times: dict[str, float | None] = {
            "time_in_queue": life.queued_s,
            "time_to_first_token": None if life.first_s is None else life.first_s - life.started_s,
            "e2e": life.ended_s - life.started_s,
        }
        attributes: dict[str, Any] = {
            "gen_ai.response.model": self._model,
            "gen_ai.request.max_tokens": life.max_tokens,
            "gen_ai.usage.prompt_tokens": life.prompt,
            "gen_ai.usage.completion_tokens": life.generated,
            "gen_ai.response.finish_reasons": (reason,),
            **{f"gen_ai.latency.{name}": value for name, value in times.items() if value is not None},
            "elastic_ep.moves": len(life.moved_s),
        }
        span = self._tracer.start_span(
            SPAN, context=_PARENT.get(), start_time=to_ns(life.started_s), attributes=attributes
        )
        if life.queued_s is not None:
            span.add_event("assigned", timestamp=to_ns(life.started_s + life.queued_s))
        for at_s in life.moved_s:
            span.add_event("moved", timestamp=to_ns(at_s))
        if life.first_s is not None:
            span.add_event("first_token", timestamp=to_ns(life.first_s))
        span.add_event("done", {"reason": reason}, timestamp=to_ns(life.ended_s))
        if reason == "abort":
            from opentelemetry.trace import StatusCode

            span.set_status(StatusCode.ERROR)
        span.end(to_ns(life.ended_s))

    async def life(self, app: web.Application) -> AsyncIterator[None]:
        """For `Application.cleanup_ctx`: what is left is sent, for a while."""
        yield
        # HAZARD: with a collector that takes nothing each batch that is left waits anew, as does whoever joins the
        # thread: a daemon's is not joined when the process ends.
        loop, sent = asyncio.get_running_loop(), asyncio.Event()

        def send() -> None:
            self._provider.shutdown()
            with suppress(RuntimeError):  # the loop has ended meanwhile
                loop.call_soon_threadsafe(sent.set)

        threading.Thread(target=send, name="last spans", daemon=True).start()
        with suppress(TimeoutError):
            await asyncio.wait_for(sent.wait(), SEND_S)


def to_endpoint(endpoint: str, model_name: str, version: str) -> Traces:
    """Spans go to the URL `endpoint` by OTLP over HTTP. Raises `TracesUnavailable`."""
    if not endpoint.startswith(("http://", "https://")):
        raise TracesUnavailable("it is no URL: give http://HOST:4318/v1/traces")
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    except ImportError as error:
        raise TracesUnavailable(_MISSING) from error
    return Traces(OTLPSpanExporter(endpoint=endpoint, timeout=SEND_S), model_name, version)


_MISSING = "it needs OpenTelemetry: pip install 'elastic-ep[otel]'"


def _wall_clock() -> Any:
    """From `time.monotonic()` to nanoseconds since 1970."""
    offset_ns = time.time_ns() - time.monotonic_ns()
    return lambda at_s: round(at_s * 1e9) + offset_ns
