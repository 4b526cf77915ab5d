"""Fuzzing the HTTP API against its own OpenAPI description."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed
from hypothesis import settings as hypothesis_settings
from schemathesis import Case, GenerationMode
from schemathesis.specs.openapi import checks

from elastic_ep.gateway.app import create_app, serve
from elastic_ep.gateway.openapi import description
from elastic_ep.group.metrics import Metrics
from tests.gateway.conftest import settings
from tests.gateway.fakes import FakeBackend, sample_text

SETTINGS = settings(admin_key="fuzz")
WITH_KEY = {"Authorization": "Bearer fuzz"}
SCHEMA = schemathesis.openapi.from_dict(description(SETTINGS))
CHECKS = [
    schemathesis.checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]


Cases = dict[GenerationMode, list[Case[Any]]]
SEEDS = {GenerationMode.POSITIVE: 20261123, GenerationMode.NEGATIVE: 20261124}
_few = hypothesis_settings(
    max_examples=200,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)


def cases_of(mode: GenerationMode) -> list[Case[Any]]:
    made: list[Case[Any]] = []

    @seed(SEEDS[mode])
    @_few
    @given(case=SCHEMA.as_strategy(mode))
    def note(case: Case[Any]) -> None:
        made.append(case)

    note()
    return made


@pytest.fixture(scope="module")
def cases() -> Cases:
    """Made before any loop runs: what rewrites schemas keeps the interpreter lock for hundreds of milliseconds."""
    return {mode: cases_of(mode) for mode in SEEDS}


@pytest.fixture(scope="module")
def url(cases: Cases) -> Iterator[str]:
    """A server with an event loop on a thread of its own: schemathesis is synchronous."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    server = asyncio.run_coroutine_threadsafe(
        serve(create_app(FakeBackend(), SETTINGS, sample_text(), Metrics(), sample_text), "127.0.0.1", 0),
        loop,
    ).result(10)
    yield server.url
    asyncio.run_coroutine_threadsafe(server.close(), loop).result(10)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(10)
    loop.close()


@pytest.fixture(scope="module")
def session() -> Iterator[requests.Session]:
    with requests.Session() as session:
        yield session


@pytest.mark.parametrize("mode", SEEDS, ids=("valid", "invalid"))
def test_requests(mode: GenerationMode, cases: Cases, url: str, session: requests.Session) -> None:
    """Every other one with the admin key."""
    assert len(cases[mode]) == _few.max_examples
    for number, case in enumerate(cases[mode]):
        headers = WITH_KEY if number % 2 else None
        case.validate_response(case.call(base_url=url, session=session, headers=headers), checks=CHECKS)


BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "x"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
    "/v1/responses": {"input": "x"},
    "/v1/messages": {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1},
    "/v1/messages/count_tokens": {"messages": [{"role": "user", "content": "x"}]},
    "/tokenize": {"messages": [{"role": "user", "content": "x"}]},
}


@pytest.mark.parametrize("path", BODIES)
def test_a_model_that_is_not_there(path: str, url: str, session: requests.Session) -> None:
    operation = SCHEMA[path]["POST"]
    case = operation.Case(body=BODIES[path] | {"model": "nobody"}, media_type="application/json")
    response = case.call(base_url=url, session=session)
    assert response.status_code == 404
    case.validate_response(response, checks=CHECKS)
