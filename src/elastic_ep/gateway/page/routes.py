"""The page's routes. It asks the group through `group/port.py` alone, and changes nothing.

All URLs in it are relative, so it works behind a proxy that serves it below a path; `--root-path` says which one where
the proxy shows it without a slash at its end.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from secrets import token_hex
from typing import Any

import msgspec
from aiohttp import web

from elastic_ep.gateway.errors import ApiError
from elastic_ep.gateway.page.feed import MOST_PAGES, PERIOD_S, Feed, TooManyPages
from elastic_ep.gateway.page.films import Films, FilmUnavailable
from elastic_ep.gateway.settings import ApiSettings
from elastic_ep.group.history import GROUP, HOST
from elastic_ep.group.metrics import Metrics
from elastic_ep.group.port import Backend
from elastic_ep.machines.rank.lifecycle import RANK, SEATED

ASSETS = Path(__file__).parents[2] / "assets" / "page"
PREFIX = "/page/"
_TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
_FILES = (
    "index.html", "base.css", "page.css", "film.css", "common.js", "film.js", "charts.js", "operator.js",
    "page.js", "icon.svg", "uplot/uPlot.iife.min.js", "uplot/uPlot.min.css",
)  # fmt: skip
OPEN_PATHS = frozenset({"/", *(PREFIX + name for name in _FILES)})
"""What is served without a key: the same for everybody, and nothing of this run."""
ACTIONS = {
    "relaunch": "/v1/fault_tolerance/relaunch",
    "kill": "/v1/fault_tolerance/kill",
    "drain": "/v1/fault_tolerance/drain",
    "scale": "/scale_elastic_ep",
    "verify": "/v1/fault_tolerance/verify",
    "rebalance": "/rebalance",
}
"""What an operator may do from the page, with an admin key."""
WRITE_S = 30.0
"""A page that takes nothing for so long is given up."""
_SECURITY = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
_EVENT_STREAM = {"Content-Type": "text/event-stream", "Cache-Control": "no-store", "X-Accel-Buffering": "no"}


@dataclass(frozen=True, slots=True)
class _Asset:
    body: bytes
    content_type: str
    tag: str


class PageHandlers:
    """`films` None: there is no event log to make them of."""

    def __init__(
        self, backend: Backend, settings: ApiSettings, metrics: Metrics, films: Films | None
    ) -> None:
        self._backend = backend
        self._films = films
        self._assets = {name: _load(name) for name in _FILES}
        self._security = {**_SECURITY}
        if settings.root_path:
            self._assets["index.html"] = _based(self._assets["index.html"], f"{settings.root_path}/")
            policy = "Content-Security-Policy"
            self._security[policy] = _SECURITY[policy].replace("base-uri 'none'", "base-uri 'self'")
        self._feed = Feed(backend, metrics, _about(settings, films is not None))

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/", self.index),
            web.get(PREFIX + "feed", self.feed),
            web.get(PREFIX + "layer/{layer:[0-9]{1,6}}", self.layer),
            web.get(PREFIX + "film/{rank:[0-9]{1,6}}/{incarnation:[0-9]{1,9}}", self.film),
            web.get(PREFIX + "{name:.+}", self.asset),
        ]

    async def life(self, app: web.Application) -> AsyncIterator[None]:
        """For `Application.cleanup_ctx`."""
        sampling = asyncio.create_task(self._feed.run())
        yield
        sampling.cancel()
        with suppress(asyncio.CancelledError):
            await sampling
        if self._films is not None:
            await self._films.close()

    async def shut_down(self, app: web.Application) -> None:
        """For `Application.on_shutdown`: before the server waits for what is under way."""
        self._feed.close()

    async def index(self, request: web.Request) -> web.StreamResponse:
        return self._send(request, "index.html")

    async def asset(self, request: web.Request) -> web.StreamResponse:
        name = request.match_info["name"]
        if name not in self._assets:
            raise web.HTTPNotFound
        return self._send(request, name)

    def _send(self, request: web.Request, name: str) -> web.Response:
        asset = self._assets[name]
        headers = {**self._security, "ETag": f'"{asset.tag}"', "Cache-Control": "no-cache"}
        if request.headers.get("If-None-Match") == headers["ETag"]:
            return web.Response(status=304, headers=headers)
        return web.Response(
            body=asset.body, content_type=asset.content_type, charset="utf-8", headers=headers
        )

    async def feed(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers=_EVENT_STREAM)
        async with aclosing(self._feed.follow()) as frames:
            try:
                first = await anext(frames)
            except TooManyPages:
                raise ApiError(
                    f"There are {MOST_PAGES} open pages already: close one.",
                    status=503,
                    code="too_many_pages",
                    headers={"Retry-After": "5"},
                ) from None
            await response.prepare(request)
            await _write(response, first)
            async for frame in frames:
                await _write(response, frame)
        await response.write_eof()
        return response

    async def layer(self, request: web.Request) -> web.StreamResponse:
        found = await self._backend.layer(int(request.match_info["layer"]))
        if found is None:
            raise web.HTTPNotFound
        return _json(msgspec.json.encode(found))

    async def film(self, request: web.Request) -> web.StreamResponse:
        if self._films is None:
            raise ApiError(
                "There is no event log to make a film of: see --event-log.", status=404, code="no_log"
            )
        rank, incarnation = int(request.match_info["rank"]), int(request.match_info["incarnation"])
        known = [loss() for loss in self._backend.history.losses]
        for loss in known:
            if (loss.rank, loss.incarnation) == (rank, incarnation):
                try:
                    return _json(await self._films.of(loss))
                except FilmUnavailable as error:
                    raise ApiError(
                        str(error), status=503, code="no_film", headers={"Retry-After": "5"}
                    ) from error
        raise ApiError(f"No loss of rank {rank}.{incarnation} is known.", status=404, code="unknown_loss")


async def _write(response: web.StreamResponse, frame: bytes) -> None:
    """Raises ConnectionError for a page that takes nothing any more."""
    try:
        async with asyncio.timeout(WRITE_S):
            await response.write(frame)
    except TimeoutError as error:
        raise ConnectionError(f"a page has taken nothing for {WRITE_S:g} s") from error


def _about(settings: ApiSettings, films: bool) -> dict[str, Any]:
    arrows = [
        (source.value, row.dest.value, row.trigger) for row in RANK.rows if row.dest for source in row.source
    ]
    return {
        "run": token_hex(8),
        "model": settings.model_name,
        "version": settings.version,
        "period_ms": round(PERIOD_S * 1000),
        "states": [state.value for state in RANK.states],
        "arrows": arrows,
        "seated": [state.value for state in SEATED],
        "group": GROUP,
        "host": HOST,
        "films": films,
        "actions": ACTIONS if settings.admin_key else {},
    }


def _load(name: str) -> _Asset:
    return _asset((ASSETS / name).read_bytes(), _TYPES[Path(name).suffix])


def _asset(body: bytes, content_type: str) -> _Asset:
    return _Asset(body, content_type, sha256(body).hexdigest()[:16])


def _based(page: _Asset, base: str) -> _Asset:
    """`page`, with all its relative URLs below `base`."""
    body = page.body.replace(b"<head>\n", f'<head>\n<base href="{base}">\n'.encode("ascii"), 1)
    return _asset(body, page.content_type)


def _json(body: bytes) -> web.Response:
    return web.Response(body=body, content_type="application/json", headers={"Cache-Control": "no-store"})


def attach(
    app: web.Application,
    backend: Backend,
    settings: ApiSettings,
    metrics: Metrics,
    films: Callable[[], Films] | None,
) -> list[web.RouteDef]:
    """The page lives as long as `app`; its routes are for the caller to add."""
    handlers = PageHandlers(backend, settings, metrics, films() if films else None)
    app.cleanup_ctx.append(handlers.life)
    app.on_shutdown.append(handlers.shut_down)
    return handlers.routes()
