"""A name for each HTTP request: the client's `X-Request-Id`, or one made here. In the answer's headers and in the log."""

from __future__ import annotations

import re
import secrets

from aiohttp import web

HEADER = "X-Request-Id"
_KEY = web.RequestKey("request_id", str)
_GIVEN = re.compile(r"[!-~]{1,128}")
"""What is taken over: it stands in headers, in answers and in lines of the log."""


def request_id(request: web.Request) -> str:
    """The same at every call for one request."""
    known = request.get(_KEY)
    if known is None:
        given = request.headers.get(HEADER, "")
        known = given if _GIVEN.fullmatch(given) else secrets.token_hex(12)
        request[_KEY] = known
    return known


async def send_request_id(request: web.Request, response: web.StreamResponse) -> None:
    """For `Application.on_response_prepare`."""
    response.headers[HEADER] = request_id(request)
