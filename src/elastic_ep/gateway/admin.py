"""Health, metrics, status, version and the tokenizer's endpoints."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from typing import Any

from aiohttp import web
from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4

from elastic_ep.gateway.bodies import Drain, Kill, Relaunch, Scale
from elastic_ep.gateway.errors import ApiError
from elastic_ep.gateway.fields import parse_object, read
from elastic_ep.gateway.openapi import description
from elastic_ep.gateway.probe import Probe
from elastic_ep.gateway.reading import Reading
from elastic_ep.gateway.serving import Serving
from elastic_ep.gateway.settings import ApiSettings
from elastic_ep.gateway.text.chat_template import DEFAULT
from elastic_ep.gateway.text.tokenizer import ChatTokenizer
from elastic_ep.group.port import Backend

SMALL_BODY_BYTES = 4096
"""What is read on the event loop without a limit of time is no larger."""


class AdminHandlers:
    def __init__(
        self,
        backend: Backend,
        settings: ApiSettings,
        text: ChatTokenizer,
        serving: Serving,
        reading: Reading,
        probe: Probe,
    ) -> None:
        self._backend = backend
        self._settings = settings
        self._text = text
        self._serving = serving
        self._metrics = serving.metrics
        self._reading = reading
        self._probe = probe
        self._description: dict[str, Any] | None = None

    def routes(self) -> list[web.RouteDef]:
        return [
            web.get("/live", self.live),
            web.get("/health", self.health),
            web.get("/health_generate", self.health_generate),
            web.get("/ping", self.ping),
            web.post("/ping", self.ping),
            web.get("/load", self.load),
            web.get("/server_info", self.server_info),
            web.get("/get_server_info", self.server_info),
            web.get("/model_info", self.model_info),
            web.get("/get_model_info", self.model_info),
            web.get("/tokenizer_info", self.tokenizer_info),
            web.get("/metrics", self.metrics),
            web.get("/version", self.version),
            web.get("/openapi.json", self.openapi),
            web.get("/v1/fault_tolerance/status", self.status),
            web.get("/v1/fault_tolerance/experts", self.experts),
            web.post("/v1/fault_tolerance/verify", self.verify),
            web.post("/v1/fault_tolerance/relaunch", self.relaunch),
            web.post("/v1/fault_tolerance/kill", self.kill),
            web.post("/v1/fault_tolerance/drain", self.drain),
            web.post("/scale_elastic_ep", self.scale),
            web.post("/is_scaling_elastic_ep", self.is_scaling),
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

    async def health_generate(self, request: web.Request) -> web.StreamResponse:
        """200 when a token has been generated, 503 when none was within the deadline."""
        health = self._backend.health()
        reason = await self._probe.fault() if health.healthy else health.reason
        return web.json_response({"healthy": not reason, "reason": reason}, status=503 if reason else 200)

    async def ping(self, request: web.Request) -> web.StreamResponse:
        """As health, without a body: for load balancers."""
        return web.Response(status=200 if self._backend.health().healthy else 503)

    async def load(self, request: web.Request) -> web.StreamResponse:
        """Requests that are being answered."""
        return web.json_response({"server_load": self._serving.load})

    async def server_info(self, request: web.Request) -> web.StreamResponse:
        return web.json_response(about_server(self._settings))

    async def model_info(self, request: web.Request) -> web.StreamResponse:
        """As SGLang's clients ask for it: the model by its name, as where its files lie is nobody's business."""
        name, longest = self._settings.model_name, self._settings.max_model_len
        return web.json_response({"model_path": name, "is_generation": True, "max_model_len": longest})

    async def tokenizer_info(self, request: web.Request) -> web.StreamResponse:
        text = self._text
        templates = text.chat_templates
        about = {
            **text.special_tokens,  # where vLLM has them
            "vocab_size": text.vocab_size,
            "special_tokens": {**text.special_tokens},
            "chat_template": templates.get(DEFAULT) if len(templates) < 2 else templates,
        }
        return web.json_response(about)

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
        head += f', "tolerates_hosts": {found.tolerates_hosts}'
        return _json(f'{{{head}, "layers": [{", ".join(layers)}]}}'.encode("ascii"))

    async def verify(self, request: web.Request) -> web.StreamResponse:
        """Every rank re-checks its slots; what differs is taken out of the placement and made anew."""
        return web.json_response(asdict(await self._backend.verify()))

    async def relaunch(self, request: web.Request) -> web.StreamResponse:
        """Launch a dead rank (all of them, without `rank` or a body) now. One that runs is left alone: 200 too."""
        raw = await _small_body(request)
        asked = read(Relaunch, parse_object(raw) if raw.strip() else {})
        return web.json_response(asdict(self._backend.relaunch(asked.rank)))

    async def kill(self, request: web.Request) -> web.StreamResponse:
        """Kill one incarnation of a rank."""
        self._for_admins()
        asked = read(Kill, parse_object(await _small_body(request)))
        return web.json_response(asdict(self._backend.kill(asked.rank, asked.incarnation)))

    async def drain(self, request: web.Request) -> web.StreamResponse:
        """Have a rank leave without a loss; answers at once."""
        self._for_admins()
        asked = read(Drain, parse_object(await _small_body(request)))
        return web.json_response(asdict(self._backend.drain(asked.rank, asked.drain_timeout)))

    async def scale(self, request: web.Request) -> web.StreamResponse:
        """Have so many ranks take part; answers when they do, as vLLM does."""
        self._for_admins()
        asked = read(Scale, parse_object(await _small_body(request)))
        size, patience_s = asked.new_data_parallel_size, asked.drain_timeout
        try:
            return web.json_response(asdict(await self._backend.scale(size, patience_s)))
        except TimeoutError as error:
            raise ApiError(str(error), status=408, kind="timeout_error", code="timeout") from None

    async def is_scaling(self, request: web.Request) -> web.StreamResponse:
        return web.json_response({"is_scaling_elastic_ep": self._backend.scaling})

    def _for_admins(self) -> None:
        """Whoever may ask for answers may not take ranks away: that needs an admin key, asked for if there is one."""
        if self._settings.admin_key is None:
            raise ApiError(
                "Ranks are taken away only where there is an admin key: see --admin-key and --admin-key-file.",
                status=403,
                kind="permission_error",
                code="no_admin_key",
            )

    async def rebalance(self, request: web.Request) -> web.StreamResponse:
        """Spread the experts by the load of late; answers when that is done."""
        return web.json_response(asdict(await self._backend.rebalance()))

    async def tokenize(self, request: web.Request) -> web.StreamResponse:
        return _json(await self._reading.answer("tokenize", await request.read()))

    async def detokenize(self, request: web.Request) -> web.StreamResponse:
        return _json(await self._reading.answer("detokenize", await request.read()))


async def _small_body(request: web.Request) -> bytes:
    raw = await request.read()
    if len(raw) > SMALL_BODY_BYTES:
        raise ApiError(
            f"This body has at most {SMALL_BODY_BYTES} bytes.", status=413, code="request_too_large"
        )
    return raw


def about_server(settings: ApiSettings) -> dict[str, Any]:
    """What it was started with, as far as requests are concerned. No keys."""
    return {
        "version": settings.version,
        "model": settings.model_name,
        "served_model_names": [settings.model_name, *settings.other_names],
        "max_model_len": settings.max_model_len,
        "vocab_size": settings.vocab_size,
        "tool_call_parser": settings.tool_call_parser,
        "reasoning_parser": settings.reasoning_parser,
        "prefix_caching": settings.shared_page_size > 0,
        "max_logprobs": settings.max_logprobs,
        "max_choices": settings.max_choices,
        "default_sampling": settings.defaults.model_dump(),
    }


def _json(body: bytes) -> web.Response:
    return web.Response(body=body, content_type="application/json")
