"""One line for each request that the server could not serve, with its id; for mistakes of clients none above debug."""

from __future__ import annotations

import asyncio
import logging
import zlib
from collections.abc import Iterable
from typing import Any

import pytest
import structlog
from structlog.testing import capture_logs

from elastic_ep.group.port import Failure, Unavailable
from elastic_ep.wire.messages import FailureCode, Token
from tests.gateway.conftest import Start
from tests.gateway.fakes import FakeBackend, Submitted, tokens_of

pytestmark = pytest.mark.anyio
ASK = {"prompt": "A", "max_tokens": 3}


@pytest.fixture(autouse=True)
def _plain_logging() -> None:
    structlog.reset_defaults()


class Failing(FakeBackend):
    """Raises at the submission, or ends every stream with the failure."""

    def __init__(self, raises: Exception | None = None, failure: Failure | None = None) -> None:
        super().__init__(reply=_aborts)
        self._raises, self._failure = raises, failure

    def submit(self, *asked: Any, **named: Any) -> Any:
        if self._raises:
            raise self._raises
        stream = super().submit(*asked, **named)
        stream.failure = self._failure
        return stream


def _aborts(_request: Submitted) -> Iterable[tuple[Token, ...]]:
    return [tuple(tokens_of([5, 6], finish="abort"))]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("backend", "status", "code", "level"),
    [
        (Failing(raises=Unavailable("no rank is left", 30)), 503, "unavailable", "warning"),
        (Failing(failure=Failure(FailureCode.TIMEOUT, "too late")), 504, "timeout", "warning"),
        (Failing(failure=Failure(FailureCode.FAILED, "a step raised")), 500, "request_failed", "warning"),
        (Failing(failure=Failure(FailureCode.REFUSED, "a token too many")), 400, "request_refused", "debug"),
    ],
    ids=["unavailable", "timeout", "failed", "refused"],
)
async def test_a_request_that_is_not_served_is_one_line(
    start: Start, stream: bool, backend: Failing, status: int, code: str, level: str
) -> None:
    running = await start(backend)
    headers = {"X-Request-Id": "the-one-in-question"}
    with capture_logs() as lines:
        async with running.http.post(
            f"{running.url}/v1/completions?x=%1b%0a", json={**ASK, "stream": stream}, headers=headers
        ) as response:
            await response.read()
            assert response.headers["X-Request-Id"] == "the-one-in-question"
    (line,) = lines
    assert line["log_level"] == level
    assert line["request_id"] == "the-one-in-question"
    assert (line["status"], line["code"]) == (status, code)
    assert (line["method"], line["path"]) == ("POST", "/v1/completions")


async def test_a_defect_of_ours_is_one_line_with_its_traceback(start: Start) -> None:
    running = await start(Failing(raises=ZeroDivisionError("ours")))
    with capture_logs() as lines:
        status, _ = await running.post("/v1/completions", ASK)
    assert status == 500
    (line,) = lines
    assert line["log_level"] == "error"
    assert isinstance(line["exc_info"], ZeroDivisionError)
    assert line["request_id"]


BODIES: dict[str, tuple[bytes, dict[str, str]]] = {
    "not deflate": (b"this is not compressed", {"Content-Encoding": "deflate"}),
    "cut off": (zlib.compress(b'{"prompt": "A"}')[:-6], {"Content-Encoding": "deflate"}),
    "not gzip": (b"nor is this", {"Content-Encoding": "gzip"}),
    "unknown coding": (b"{}", {"Content-Encoding": "rot13"}),
    "no JSON": (b"{", {}),
}


@pytest.mark.parametrize(("body", "headers"), BODIES.values(), ids=BODIES.keys())
async def test_what_clients_do_wrong_is_no_warning(
    start: Start, caplog: pytest.LogCaptureFixture, body: bytes, headers: dict[str, str]
) -> None:
    running = await start()
    with capture_logs() as lines, caplog.at_level(logging.INFO):
        async with running.http.post(
            f"{running.url}/v1/completions", data=body, headers=headers, skip_auto_headers=["Accept-Encoding"]
        ) as response:
            assert 400 <= response.status < 500
    assert {line["log_level"] for line in lines} == {"debug"}
    assert [repr(r.exc_info) for r in caplog.records] == []
    assert {line["status"] for line in lines if "status" in line} <= {response.status}


@pytest.mark.parametrize(
    "said",
    [
        b"garbage\r\n\r\n",
        b"\x16\x03\x01\x02\x00",
        b"GET / HTTP/9.9\r\n\r\n",
        b"POST / HTTP/1.1\r\nA b: c\r\n\r\n",
    ],
)
async def test_what_is_no_http_is_no_warning(
    start: Start, caplog: pytest.LogCaptureFixture, said: bytes
) -> None:
    running = await start()
    with capture_logs() as lines, caplog.at_level(logging.INFO):
        reader, writer = await asyncio.open_connection("127.0.0.1", running.server.port)
        writer.write(said)
        writer.write_eof()
        async with asyncio.timeout(20):
            await reader.read()
        writer.close()
        await writer.wait_closed()
    assert {line["log_level"] for line in lines} <= {"debug"}
    assert [repr(record.exc_info) for record in caplog.records] == []
