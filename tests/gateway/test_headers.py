"""Headers around every answer: a request's id, and what browsers ask of other origins."""

from __future__ import annotations

import gzip
from typing import Any

import pytest

from elastic_ep.gateway.cors import Cors
from tests.gateway.conftest import Running, Start
from tests.gateway.fakes import FakeBackend

pytestmark = pytest.mark.anyio
ORIGIN = "http://page.example"
COMPLETIONS = "/v1/completions"

ASKED: dict[str, tuple[str, str, Any]] = {
    "answer": ("POST", COMPLETIONS, {"prompt": "A"}),
    "stream": ("POST", COMPLETIONS, {"prompt": "A", "stream": True}),
    "bad value": ("POST", COMPLETIONS, {"prompt": "A", "n": 0}),
    "no JSON": ("POST", "/tokenize", None),
    "no such path": ("GET", "/v1/nothing", None),
    "wrong method": ("DELETE", COMPLETIONS, None),
    "too large": ("POST", COMPLETIONS, {"prompt": "A" * 5000}),
    "probe": ("GET", "/health", None),
    "our defect": ("GET", "/v1/fault_tolerance/status", None),
}


class Broken(FakeBackend):
    def status(self) -> Any:
        raise RuntimeError("defect")


@pytest.fixture
async def running(start: Start) -> Running:
    return await start(Broken(), max_body_bytes=4000)


async def headers_of(running: Running, asked: tuple[str, str, Any], **headers: str) -> Any:
    method, path, body = asked
    async with running.http.request(method, running.url + path, json=body, headers=headers) as response:
        await response.read()
        return response.headers


@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED.keys())
async def test_every_answer_has_the_requests_id(running: Running, asked: tuple[str, str, Any]) -> None:
    assert (await headers_of(running, asked, **{"X-Request-Id": "mine-7"})).getall("X-Request-Id") == [
        "mine-7"
    ]
    made = [(await headers_of(running, asked))["X-Request-Id"] for _ in range(2)]
    assert all(len(one) > 16 for one in made)
    assert made[0] != made[1]


@pytest.mark.parametrize("given", ["", "a b", "x" * 129, "\xe9", "a\tb"])
async def test_an_id_that_could_not_stand_in_a_line_is_not_taken_over(running: Running, given: str) -> None:
    answer = await headers_of(running, ASKED["answer"], **{"X-Request-Id": given})
    assert answer["X-Request-Id"] != given
    assert len(answer["X-Request-Id"]) > 16


async def test_without_a_key_too(start: Start) -> None:
    running = await start(api_keys=("secret",))
    answer = await headers_of(running, ASKED["answer"], Origin=ORIGIN, **{"X-Request-Id": "mine"})
    assert answer["X-Request-Id"] == "mine"
    assert answer["Access-Control-Allow-Origin"] == "*"


@pytest.mark.parametrize("body", [{}, {"request_id": "other"}, {"rid": "other"}])
async def test_an_answers_id_is_the_requests(running: Running, body: dict[str, str]) -> None:
    named = {"X-Request-Id": "mine"}
    async with running.http.post(
        running.url + COMPLETIONS, json={"prompt": "A"} | body, headers=named
    ) as response:
        assert (await response.json())["id"] == ("cmpl-other" if body else "cmpl-mine")
        assert response.headers["X-Request-Id"] == "mine"


@pytest.mark.parametrize("asked", ASKED.values(), ids=ASKED.keys())
@pytest.mark.parametrize(
    ("cors", "allowed", "varies"),
    [
        (Cors(), "*", False),
        (Cors(credentials=True), ORIGIN, True),
        (Cors(origins=(ORIGIN, "http://b.example")), ORIGIN, True),
        (Cors(origins=("http://b.example",)), None, True),
        (Cors(origins=()), None, False),
    ],
)
async def test_pages_of_allowed_origins_may_read_every_answer(
    start: Start, asked: tuple[str, str, Any], cors: Cors, allowed: str | None, varies: bool
) -> None:
    running = await start(Broken(), max_body_bytes=4000, cors=cors)
    answer = await headers_of(running, asked, Origin=ORIGIN)
    assert answer.get("Access-Control-Allow-Origin") == allowed
    assert answer.get("Access-Control-Allow-Credentials") == (
        "true" if allowed and cors.credentials else None
    )
    assert (answer.get("Vary") == "Origin") == varies
    if allowed:
        assert "X-Request-Id" in answer["Access-Control-Expose-Headers"]
    assert "Access-Control-Allow-Origin" not in await headers_of(running, asked)


def preflight(origin: str = ORIGIN, method: str = "POST", headers: str = "") -> dict[str, str]:
    asked = {"Origin": origin, "Access-Control-Request-Method": method}
    return asked | ({"Access-Control-Request-Headers": headers} if headers else {})


@pytest.mark.parametrize("path", [COMPLETIONS, "/health", "/v1/fault_tolerance/verify"])
async def test_a_preflight_needs_no_key(start: Start, path: str) -> None:
    running = await start(api_keys=("secret",))
    asked = preflight(headers="authorization, content-type")
    async with running.http.options(running.url + path, headers=asked) as response:
        assert response.status == 200
        assert response.headers["Access-Control-Allow-Origin"] == "*"
        assert response.headers["Access-Control-Allow-Methods"] == "POST"
        assert response.headers["Access-Control-Allow-Headers"] == "authorization, content-type"
    assert running.backend.submitted == []


@pytest.mark.parametrize(
    "asked",
    [
        preflight(origin="http://other.example"),
        preflight(method="DELETE"),
        preflight(headers="content-type, x-secret"),
    ],
)
async def test_a_preflight_of_what_is_not_allowed(start: Start, asked: dict[str, str]) -> None:
    cors = Cors(origins=(ORIGIN,), methods=("GET", "POST"), headers=("Content-Type",))
    running = await start(cors=cors)
    async with running.http.options(running.url + COMPLETIONS, headers=asked) as response:
        assert response.status == 400
        assert (await response.json())["error"]["code"] == "cors_refused"
    fine = preflight(headers="CONTENT-TYPE")
    async with running.http.options(running.url + COMPLETIONS, headers=fine) as response:
        assert response.status == 200


async def test_options_without_an_origin_is_a_wrong_method(running: Running) -> None:
    async with running.http.options(running.url + COMPLETIONS) as response:
        assert response.status == 405


@pytest.mark.parametrize("path", [COMPLETIONS, "/tokenize", "/v1/fault_tolerance/verify"])
async def test_a_compressed_body_is_refused_and_nothing_of_it_is_read(start: Start, path: str) -> None:
    running = await start(FakeBackend(), max_body_bytes=4000)
    packed = gzip.compress(b" " * 100_000 + b'{"prompt": "A"}')
    for encoding in ("gzip", "deflate", "br"):
        headers = {"Content-Encoding": encoding, "Content-Type": "application/json"}
        async with running.http.post(running.url + path, data=packed, headers=headers) as response:
            error = (await response.json())["error"]
        assert (response.status, error["param"]) == (415, "Content-Encoding")
    async with running.http.post(
        running.url + COMPLETIONS, json={"prompt": "A"}, headers={"Content-Encoding": "identity"}
    ) as response:
        assert response.status == 200
