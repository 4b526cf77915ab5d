"""A proxy shows the server below a path, and takes it off or leaves it on."""

from __future__ import annotations

import re
from typing import Any
from urllib.parse import urljoin

import pytest
from aiohttp import web

from elastic_ep.config import OWN_PATHS, ConfigError, ServeConfig
from elastic_ep.gateway.app import _ADMIN_PATHS, create_app
from elastic_ep.gateway.root_path import attach
from elastic_ep.group.metrics import Metrics
from tests.gateway.conftest import Running, Start, settings
from tests.gateway.fakes import FakeBackend, sample_text

pytestmark = pytest.mark.anyio
ROOT = "/models/little"
PLACES = ["", ROOT]


def routes(root: str = "") -> set[tuple[str, str]]:
    app = create_app(FakeBackend(), settings(root_path=root), sample_text(), Metrics(), sample_text)
    return {(route.method, route.resource.canonical) for route in app.router.routes() if route.resource}


def test_every_path_is_served_with_the_prefix_and_without() -> None:
    plain = routes()
    assert routes(ROOT) == plain | {(method, ROOT + path) for method, path in plain} | {
        (method, ROOT) for method, path in plain if path == "/"
    }
    assert {path.split("/")[1] for _, path in plain} == OWN_PATHS | {""}


async def asked(running: Running, method: str, path: str, **more: Any) -> tuple[int, Any]:
    async with running.http.request(method, running.url + path, **more) as response:
        return response.status, await response.json()


@pytest.mark.parametrize("place", PLACES)
async def test_keys_are_asked_for_below_the_prefix_too(start: Start, place: str) -> None:
    running = await start(api_keys=("user",), admin_key="boss", root_path=ROOT)
    user = {"Authorization": "Bearer user"}
    assert (await asked(running, "GET", f"{place}/health"))[0] == 200
    assert (await asked(running, "GET", f"{place}/v1/models"))[0] == 401
    assert (await asked(running, "GET", f"{place}/v1/models", headers=user))[0] == 200
    for path in _ADMIN_PATHS:
        for spelt in (path, path.replace("a", "%61")):
            assert (await asked(running, "POST", place + spelt, json={}, headers=user))[0] == 401, spelt
    for begin in ("/", ""):
        async with running.http.get(running.url + place + begin) as response:
            assert response.status == 200  # the page


@pytest.mark.parametrize("place", PLACES)
async def test_errors_have_the_shape_of_their_endpoint(start: Start, place: str) -> None:
    running = await start(root_path=ROOT)
    _, told = await asked(running, "POST", f"{place}/v1/messages", json={})
    assert told["type"] == "error"
    _, told = await asked(running, "POST", f"{place}/v1/completions", json={})
    assert told["error"]["param"] == "prompt"
    assert (await asked(running, "GET", f"{place}/v1/nothing"))[0] == 404
    assert (await asked(running, "GET", f"{ROOT}x/v1/models"))[0] == 404


@pytest.mark.parametrize("begin", [ROOT, f"{ROOT}/", "/"])
async def test_the_page_finds_its_files_below_the_prefix(start: Start, begin: str) -> None:
    running = await start(root_path=ROOT)
    async with running.http.get(running.url + begin) as response:
        text, policy = await response.text(), response.headers["Content-Security-Policy"]
    (base,) = re.findall(r'<base href="([^"]*)">', text)
    assert "base-uri 'self'" in policy
    assert text.index("<base") < text.index("<link")
    for url in re.findall(r'(?:src|href)="(page/[^"]*)"', text):
        path = urljoin(urljoin(begin, base), url)
        assert path.startswith(ROOT)
        async with running.http.get(running.url + path) as response:
            assert response.status == 200, path


async def test_the_description_names_the_prefix(start: Start) -> None:
    for root, servers in (("", None), (ROOT, [{"url": ROOT}])):
        running = await start(root_path=root)
        _, document = await asked(running, "GET", f"{root}/openapi.json")
        assert document.get("servers") == servers


@pytest.mark.parametrize("root", ["", "/x", "/x/", "/a/b.c~_-", "/.well-known"])
def test_paths_that_are_taken(root: str) -> None:
    assert ServeConfig(model="", root_path=root).root_path == root


@pytest.mark.parametrize(
    "root", ["x", "/", "//x", "/x//y", "/../x", "/x/..", "/x y", "/x?", "/é", '/"', "/{x}", "/x\n", "/x%2f"]
    + [f"/{name}{more}" for name, more in zip(sorted(OWN_PATHS), ["", "/x"] * 10, strict=True)],
)  # fmt: skip
def test_paths_that_are_refused(root: str) -> None:
    with pytest.raises(ConfigError, match="--root-path"):
        ServeConfig(model="", root_path=root)


def test_a_prefix_that_begins_as_a_path_of_the_server_is_never_attached() -> None:
    async def nothing(request: web.Request) -> web.Response:
        return web.Response()

    with pytest.raises(ValueError, match="begins as"):
        attach(web.Application(), "/v1", [web.get("/v1/models", nothing)])
