"""Cross-origin requests of browsers (the Fetch standard's CORS), with vLLM's flags and defaults."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from aiohttp import hdrs, web

from elastic_ep.gateway.errors import ApiError, Handler
from elastic_ep.gateway.request_id import HEADER as REQUEST_ID

_ANY = "*"
_EXPOSED = f"{REQUEST_ID}, Retry-After"
_MAX_AGE_S = "600"


@dataclass(frozen=True, slots=True)
class Cors:
    """Who may call from a browser. `("*",)` stands for all; `origins` empty: nobody."""

    origins: tuple[str, ...] = (_ANY,)
    methods: tuple[str, ...] = (_ANY,)
    headers: tuple[str, ...] = (_ANY,)
    credentials: bool = False

    def middleware(self) -> Any:
        """Answers preflights, which carry no key and reach no handler."""

        @web.middleware
        async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
            if request.method == hdrs.METH_OPTIONS and hdrs.ACCESS_CONTROL_REQUEST_METHOD in request.headers:
                return self._preflight(request)
            return await handler(request)

        return middleware

    async def send_headers(self, request: web.Request, response: web.StreamResponse) -> None:
        """For `Application.on_response_prepare`: streams and errors have them too."""
        origin = request.headers.get(hdrs.ORIGIN)
        if not self.origins or origin is None:
            return
        # The same path has other headers for another origin: caches must know.
        if not self._everybody:
            response.headers.add(hdrs.VARY, hdrs.ORIGIN)
        if self._allows(origin):
            response.headers[hdrs.ACCESS_CONTROL_ALLOW_ORIGIN] = _ANY if self._everybody else origin
            response.headers[hdrs.ACCESS_CONTROL_EXPOSE_HEADERS] = _EXPOSED
            if self.credentials:
                response.headers[hdrs.ACCESS_CONTROL_ALLOW_CREDENTIALS] = "true"

    @property
    def _everybody(self) -> bool:
        """Browsers take no `*` for requests with credentials: those are told their own origin."""
        return _ANY in self.origins and not self.credentials

    def _allows(self, origin: str) -> bool:
        return _ANY in self.origins or origin in self.origins

    def _preflight(self, request: web.Request) -> web.Response:
        origin = request.headers.get(hdrs.ORIGIN, "")
        method = request.headers[hdrs.ACCESS_CONTROL_REQUEST_METHOD]
        asked = request.headers.get(hdrs.ACCESS_CONTROL_REQUEST_HEADERS, "")
        names = [name.strip() for name in asked.split(",") if name.strip()]
        allowed = {name.lower() for name in self.headers}
        if not self._allows(origin):
            raise _refused(f"origin {origin!r}", "--allowed-origins")
        if _ANY not in self.methods and method not in self.methods:
            raise _refused(f"method {method!r}", "--allowed-methods")
        for name in names:
            if _ANY not in self.headers and name.lower() not in allowed:
                raise _refused(f"header {name!r}", "--allowed-headers")
        answer = {hdrs.ACCESS_CONTROL_ALLOW_METHODS: method, hdrs.ACCESS_CONTROL_MAX_AGE: _MAX_AGE_S}
        if names:
            answer[hdrs.ACCESS_CONTROL_ALLOW_HEADERS] = ", ".join(names)
        return web.Response(headers=answer)


def _refused(what: str, flag: str) -> ApiError:
    return ApiError(f"Cross-origin requests with {what} are not allowed: see {flag}.", code="cors_refused")
