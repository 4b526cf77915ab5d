"""Health, metrics, status, version and the tokenizer's endpoints."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from typing import Any

from aiohttp import web
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4

from elastic_ep.gateway.bodies import Relaunch
from elastic_ep.gateway.errors import ApiError
from elastic_ep.gateway.fields import parse_object, read
from elastic_ep.gateway.openapi import description
from elastic_ep.gateway.reading import Reading
from elastic_ep.gateway.settings import ApiSettings
from elastic_ep.group.metrics import Metrics
from elastic_ep.group.port import Backend

SMALL_BODY_BYTES = 4096
"""What is read on the event loop without a limit of time is no larger."""


class AdminHandlers:
    def __init__(self, backend: Backend, settings: ApiSettings, metrics: Metrics, reading: Reading) -> None:
        self._backend = backend
        self._settings = settings
        self._metrics = metrics
        self._reading = reading
        self._description: dict[str, Any] | None = None

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/live", self.live),
            web.get("/health", self.health),
            web.get("/metrics", self.metrics),
            web.get("/version", self.version),
            web.get("/openapi.json", self.openapi),
            web.get("/v1/fault_tolerance/status", self.status),
            web.get("/v1/fault_tolerance/experts", self.experts),
            web.post("/v1/fault_tolerance/verify", self.verify),
            web.post("/v1/fault_tolerance/relaunch", self.relaunch),
            web.post("/rebalance", self.rebalance),
            web.post("/tokenize", self.tokenize),
            web.post("/detokenize", self.detokenize),
        ]

    async def live(self, request: web.Request) -> web.StreamResponse:
        """The process answers; says nothing about ranks."""
        return web.json_response({"status": "live"})

    async def health(self, request: web.Request) -> web.StreamResponse:
        """200 while a request is answered now, or within the pause that a loss normally makes."""
        health = self._backend.health()
        return web.json_response(asdict(health), status=200 if health.healthy else 503)

    async def metrics(self, request: web.Request) -> web.StreamResponse:
        self._backend.refresh_metrics()
        parts = []
        for part in self._metrics.parts():
            parts.append(part)
            await asyncio.sleep(0)  # with many ranks it is milliseconds
        return web.Response(body=b"".join(parts), headers={"Content-Type": CONTENT_TYPE_PLAIN_0_0_4})

    async def version(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"version": self._settings.version})

    async def openapi(self, request: web.Request) -> web.StreamResponse:
        if self._description is None:  # it takes a tenth of a second to make
            self._description = await asyncio.to_thread(description, self._settings)
        return web.json_response(self._description)

    async def status(self, request: web.Request) -> web.StreamResponse:
        return web.json_response(asdict(self._backend.status()))

    async def experts(self, request: web.Request) -> web.StreamResponse:
        """Per layer, which slot holds which expert."""
        found = await self._backend.experts()
        layers = []
        for layer in found.layers:
            # A large model has tens of thousands of slots: others have their turn between each two layers.
            layers.append(json.dumps(asdict(layer)))
            await asyncio.sleep(0)
        head = f'"version": {found.version}, "tolerates": {found.tolerates}'
        return _json(f'{{{head}, "layers": [{", ".join(layers)}]}}'.encode("ascii"))

    async def verify(self, request: web.Request) -> web.StreamResponse:
        """Every rank re-checks its slots; what differs is taken out of the placement and made anew."""
        return web.json_response(asdict(await self._backend.verify()))

    async def relaunch(self, request: web.Request) -> web.StreamResponse:
        """Launch a dead rank (all of them, without `rank` or a body) now. One that runs is left alone: 200 too."""
        raw = await request.read()
        if len(raw) > SMALL_BODY_BYTES:
            raise ApiError(
                f"This body has at most {SMALL_BODY_BYTES} bytes.", status=413, code="request_too_large"
            )
        asked = read(Relaunch, parse_object(raw) if raw.strip() else {})
        return web.json_response(asdict(self._backend.relaunch(asked.rank)))

    async def rebalance(self, request: web.Request) -> web.StreamResponse:
        """Spread the experts by the load of late; answers when that is done."""
        return web.json_response(asdict(await self._backend.rebalance()))

    async def tokenize(self, request: web.Request) -> web.StreamResponse:
        return _json(await self._reading.answer("tokenize", await request.read()))

    async def detokenize(self, request: web.Request) -> web.StreamResponse:
        return _json(await self._reading.answer("detokenize", await request.read()))


def _json(body: bytes) -> web.Response:
    return web.Response(body=body, content_type="application/json")
