"""Puts the HTTP API together and serves it."""

from __future__ import annotations

import hmac
import logging
import ssl
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import structlog
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError

from elastic_ep.gateway.admin import AdminHandlers
from elastic_ep.gateway.errors import ApiError, Handler, error_middleware
from elastic_ep.gateway.guided import KnownGrammars
from elastic_ep.gateway.messages.handlers import MessagesHandlers
from elastic_ep.gateway.openai import OpenAiHandlers
from elastic_ep.gateway.page import routes as page
from elastic_ep.gateway.page.films import Films
from elastic_ep.gateway.probe import Probe
from elastic_ep.gateway.reading import BodyReader, Reading
from elastic_ep.gateway.request_id import send_request_id
from elastic_ep.gateway.responses.handlers import ResponsesHandlers
from elastic_ep.gateway.root_path import attach, own_path
from elastic_ep.gateway.serving import Serving
from elastic_ep.gateway.settings import ApiSettings
from elastic_ep.gateway.text.tokenizer import ChatTokenizer
from elastic_ep.gateway.text_worker import Begun, TextWorker, WorkerSetup
from elastic_ep.gateway.traces import Traces
from elastic_ep.group.metrics import Metrics
from elastic_ep.group.port import Backend

log = structlog.get_logger()
_OPEN_PATHS = frozenset({"/live", "/health", "/health_generate", "/ping", "/metrics"}) | page.OPEN_PATHS
_ADMIN_PATHS = frozenset(page.ACTIONS.values())


READING = web.AppKey("reading", Reading)


def create_app(
    backend: Backend,
    settings: ApiSettings,
    text: ChatTokenizer,
    metrics: Metrics,
    load_text: Callable[[], ChatTokenizer],
    films: Callable[[], Films] | None = None,
    traces: Traces | None = None,
    begun: Begun | None = None,
) -> web.Application:
    """The application. Serve it with `serve`, or a runner with `handler_cancellation=True`: without it
    aiohttp lets handlers run on after their client has gone.

    `load_text`, which must be picklable, makes the like of `text` in the process that reads large bodies. That one is
    started by the first large body, or by `app[READING].worker.warm()`, if it is not `begun`. `films`: of what the page
    shows them; None: of nothing. `traces` hear of every choice that has ended.
    """
    middlewares = [error_middleware(metrics.http_error), settings.cors.middleware(), _plain_bodies]
    if settings.api_keys or settings.admin_key:
        middlewares.append(_key_middleware(settings.api_keys, settings.admin_key))
    if traces is not None:
        middlewares.append(traces.middleware())
    metrics.known_as(settings.model_name)
    app = web.Application(middlewares=middlewares, client_max_size=settings.max_body_bytes)
    app.on_response_prepare.append(send_request_id)
    app.on_response_prepare.append(settings.cors.send_headers)
    known, worker = KnownGrammars(), TextWorker(WorkerSetup(settings, load_text), begun)
    reading = app[READING] = Reading(BodyReader(settings, text, known), worker, known)
    app.on_cleanup.append(_close_worker)
    if traces is not None:
        app.cleanup_ctx.append(traces.life)
    serving = Serving(backend, text, metrics, traces)
    responses = ResponsesHandlers(serving, settings, reading)
    probe = Probe(serving, reading)
    app.on_shutdown.append(lambda _: responses.close())
    app.on_shutdown.append(lambda _: probe.close())
    routes = [
        *OpenAiHandlers(serving, settings, reading).routes(),
        *responses.routes(),
        *MessagesHandlers(serving, settings, reading).routes(),
        *AdminHandlers(backend, settings, text, serving, reading, probe).routes(),
        *page.attach(app, backend, settings, metrics, films),
    ]
    attach(app, settings.root_path, routes)
    return app


@dataclass(frozen=True, slots=True)
class Server:
    """A server that listens. `url` has the real port, also when 0 was asked for."""

    url: str
    port: int
    _runner: web.AppRunner

    async def close(self) -> None:
        """Stop listening, let responses under way finish as long as `serve` was told, then cut them off."""
        await self._runner.cleanup()


async def serve(
    app: web.Application, host: str, port: int, *, grace_s: float = 1.0, tls: ssl.SSLContext | None = None
) -> Server:
    """Listen on `host`:`port` (0 picks one). Raises OSError when the port is taken.

    Handlers are cancelled when their client disconnects, and `grace_s` seconds after `Server.close`.
    """
    logger = logging.getLogger("elastic_ep.http")
    logger.addFilter(_is_ours)
    runner = web.AppRunner(
        app,
        handler_cancellation=True,
        access_log=None,
        handle_signals=False,
        shutdown_timeout=grace_s,
        logger=logger,
        auto_decompress=False,
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port, ssl_context=tls).start()
    except BaseException:
        await runner.cleanup()
        raise
    bound: int = runner.addresses[0][1]
    shown = f"[{host}]" if ":" in host else host
    scheme = "http" if tls is None else "https"
    return Server(f"{scheme}://{shown}:{bound}", bound, runner)


@web.middleware
async def _plain_bodies(request: web.Request, handler: Handler) -> web.StreamResponse:
    """A few bytes can stand for gigabytes, which would be made on the event loop, of a refused request too."""
    encoding = request.headers.get("Content-Encoding", "identity")
    if encoding.lower() != "identity":
        message = "This server reads no compressed bodies: send it without Content-Encoding."
        raise ApiError(message, status=415, param="Content-Encoding", code="unsupported_content_encoding")
    return await handler(request)


def _is_ours(record: logging.LogRecord) -> bool:
    """aiohttp takes what a client has broken in its own request, or its leaving, for an error of the server."""
    error = record.exc_info[1] if record.exc_info else None
    theirs = isinstance(error, (web.RequestPayloadError, HttpProcessingError, ConnectionError))
    if theirs:
        log.debug("request refused", why=f"{type(error).__name__}: {error}")
    return not theirs


async def _close_worker(app: web.Application) -> None:
    await app[READING].worker.close()


def _key_middleware(keys: tuple[str, ...], admin_key: str | None) -> Any:
    """`admin_key` opens everything, and alone what changes the group, if there is one."""
    for_all = [key.encode() for key in keys]
    for_admins = for_all if admin_key is None else [admin_key.encode()]

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        path = own_path(request)
        wanted = for_admins if path in _ADMIN_PATHS else [*for_all, *for_admins] if for_all else []
        if wanted and path not in _OPEN_PATHS:
            # The scheme's name is case-insensitive (RFC 9110).
            scheme, _, token = request.headers.get("Authorization", "").partition(" ")
            # aiohttp decodes headers with surrogateescape.
            given = token.encode("utf-8", "surrogateescape")
            # As Anthropic's clients send it.
            other = request.headers.get("X-Api-Key")
            if other is not None and not token:
                scheme, given = "bearer", other.encode("utf-8", "surrogateescape")
            # Compare with all of them, and in constant time: nothing can be learnt from how long it takes.
            known = sum(hmac.compare_digest(given, key) for key in wanted)
            if scheme.lower() != "bearer" or not known:
                which = (
                    "A valid API key" if wanted is not for_admins or admin_key is None else "The admin key"
                )
                raise ApiError(
                    f"{which} is needed, as 'Authorization: Bearer KEY'.",
                    status=401,
                    kind="authentication_error",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        return await handler(request)

    return middleware
