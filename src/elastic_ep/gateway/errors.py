"""Every error a client can see, as OpenAI's error object."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from typing import Any

import structlog
from aiohttp import web

from elastic_ep.gateway.request_id import request_id
from elastic_ep.gateway.root_path import own_path
from elastic_ep.group.port import (
    Busy,
    Conflict,
    Failure,
    OutOfRange,
    Refused,
    Stopping,
    Unavailable,
    UnknownRank,
)
from elastic_ep.wire.messages import FailureCode

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
log = structlog.get_logger()


class ApiError(Exception):
    """An answer other than success: `status` and the four fields of OpenAI's error object."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.status = status
        self.kind = kind
        self.param = param
        self.code = code
        self.headers = headers or {}

    def body(self) -> dict[str, Any]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    def response(self, path: str = "") -> web.Response:
        """In the shape of the API that `path` belongs to."""
        body = messages_body(self) if path.startswith("/v1/messages") else self.body()
        return web.Response(
            body=json.dumps(body).encode("ascii"),
            status=self.status,
            content_type="application/json",
            headers=self.headers,
        )


_ANTHROPIC = {
    401: "authentication_error", 403: "permission_error", 404: "not_found_error", 413: "request_too_large",
    429: "rate_limit_error", 503: "overloaded_error", 504: "timeout_error",
}  # fmt: skip


def messages_body(error: ApiError) -> dict[str, Any]:
    """In Anthropic's shape."""
    kind = _ANTHROPIC.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message}}


def translate(error: Exception) -> ApiError | None:
    """`error` as an `ApiError`, or None for what is a defect of ours or no error."""
    match error:
        case ApiError():
            return error
        case Busy():
            return ApiError(
                "The server has too many requests queued. Try again later.",
                status=429,
                kind="rate_limit_error",
                code="rate_limit_exceeded",
                headers={"Retry-After": str(error.retry_after_s)},
            )
        case Refused():
            return failed(Failure(FailureCode.REFUSED, str(error)))
        case Unavailable():
            return unavailable(str(error), error.retry_after_s)
        case Stopping():
            return stopping()
        case UnknownRank():
            return ApiError(str(error), status=404, param="rank", code="rank_not_found")
        case Conflict():
            return ApiError(str(error), status=409, kind="conflict_error", code="conflict")
        case OutOfRange():
            return ApiError(str(error), param=error.field, code="invalid_value")
        case web.HTTPException():
            return _from_aiohttp(error)
        case web.RequestPayloadError():
            return ApiError("The request body could not be read.")
    return None


def unexpected(request: web.Request, error: Exception) -> ApiError:
    """A defect of ours: log it, and tell the client no more than that."""
    log.error(
        "unhandled error",
        method=request.method,
        path=request.rel_url.raw_path,
        request_id=request_id(request),
        exc_info=error,
    )
    return ApiError("Internal server error.", status=500, kind="internal_error")


def stopping() -> ApiError:
    return ApiError(
        "The server is shutting down.",
        status=503,
        kind="service_unavailable_error",
        code="stopping",
        headers={"Retry-After": "5"},
    )


def unknown_model(name: str) -> ApiError:
    return ApiError(f"The model '{name}' does not exist.", status=404, param="model", code="model_not_found")


def prompt_too_long(longest: int, tokens: str, param: str) -> ApiError:
    return ApiError(
        f"This model's maximum context length is {longest} tokens, and one must be left to generate. "
        f"Your {param} came to {tokens} tokens.",
        param=param,
        code="context_length_exceeded",
    )


UNAVAILABLE_RETRY_S = 30
_FAILURES = {
    FailureCode.REFUSED: (400, "invalid_request_error"),
    FailureCode.FAILED: (500, "internal_error"),
    FailureCode.TIMEOUT: (504, "timeout_error"),
    FailureCode.ABORTED: (503, "service_unavailable_error"),
}


def failed(failure: Failure) -> ApiError:
    """What a client hears of a request that was admitted and ended before its time."""
    if failure.code is FailureCode.UNAVAILABLE:
        return unavailable(failure.detail, UNAVAILABLE_RETRY_S)
    status, kind = _FAILURES[failure.code]
    message = f"The server ended this request before it was complete: {failure.detail}."
    return ApiError(message, status=status, kind=kind, code=failure.code.value)


def unavailable(reason: str, retry_after_s: int) -> ApiError:
    return ApiError(
        f"The server cannot serve now, and will not by itself: {reason}.",
        status=503,
        kind="service_unavailable_error",
        code=FailureCode.UNAVAILABLE.value,
        headers={"Retry-After": str(retry_after_s)},
    )


def _from_aiohttp(error: web.HTTPException) -> ApiError | None:
    if error.status < 400:
        return None
    kept = {name: value for name, value in error.headers.items() if name in ("Allow", "Retry-After")}
    messages = {
        404: "Unknown path.",
        405: f"Method not allowed here. Allowed: {kept.get('Allow', 'none')}.",
        413: "The request body is larger than this server accepts.",
    }
    code = {413: "request_too_large", 404: "not_found", 405: "method_not_allowed"}.get(error.status)
    return ApiError(messages.get(error.status, error.reason), status=error.status, code=code, headers=kept)


def error_middleware(count: Callable[[int], None]) -> Any:
    """Turns exceptions into error objects. `count` is called with the status of each."""

    @web.middleware
    async def middleware(request: web.Request, handler: Handler) -> web.StreamResponse:
        try:
            return await handler(request)
        # A broken connection is nobody's error: the client has gone. aiohttp expects it to come through.
        except ConnectionError:
            raise
        except Exception as error:
            answer = translate(error)
            if answer is None:
                if isinstance(error, web.HTTPException):
                    raise
                answer = unexpected(request, error)
            else:
                tell(request, answer)
            count(answer.status)
            return answer.response(own_path(request))

    return middleware


def tell(request: web.Request, answer: ApiError) -> None:
    """A line for the operator: what the server could not do is a warning, what a client did wrong is for debugging.

    With the path as the client has written it: decoded it might hold anything.
    """
    say = log.warning if answer.status >= 500 else log.debug
    say(
        "request failed" if answer.status >= 500 else "request refused",
        method=request.method,
        path=request.rel_url.raw_path,
        status=answer.status,
        code=answer.code,
        why=answer.message,
        request_id=request_id(request),
    )
