"""The page's files, its feed, and who may have what."""

from __future__ import annotations

import asyncio
import json
import random
import re
from contextlib import AsyncExitStack, aclosing
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

from elastic_ep.gateway.page.feed import KEPT_SAMPLES, MOST_PAGES, Feed, TooManyPages
from elastic_ep.gateway.page.films import Films, FilmUnavailable
from elastic_ep.gateway.page.routes import ACTIONS, ASSETS, OPEN_PATHS
from elastic_ep.group.history import MOST_LOSSES, MOST_MOVES, History
from elastic_ep.group.metrics import Metrics
from elastic_ep.group.port import EngineStatus, Loss
from tests.gateway.conftest import Running, Start
from tests.gateway.fakes import FakeBackend
from tests.test_replay import log as log  # a fixture

pytestmark = pytest.mark.anyio
DEADLINE_S = 10.0
FILES = sorted(path for path in OPEN_PATHS if path != "/")


def loss(rank: int, incarnation: int = 1, why: str = "signal 9") -> Loss:
    return Loss(rank, incarnation, 1000, 1, "Serving", "killed", why, 2, "0.1: 2", None, None)


def frame_of(event: bytes) -> tuple[int, dict[str, Any]]:
    found = re.fullmatch(rb"id: (\d+)\ndata: ([^\n]*)\n\n", event)
    assert found is not None
    return int(found[1]), json.loads(found[2])


class Page:
    """What the page's script keeps of the frames that it has had."""

    def __init__(self) -> None:
        self.ranks: dict[int, list[Any]] = {}
        self.moves: list[list[Any]] = []
        self.losses: list[list[Any]] = []
        self.samples: list[list[Any]] = []
        self.snapshots = 0

    def take(self, frame: dict[str, Any]) -> None:
        if frame.get("snapshot"):
            self.ranks, self.moves, self.samples = {}, [], []
            self.snapshots += 1
        for row in frame.get("ranks", []):
            if len(row) == 1:
                self.ranks.pop(row[0], None)
            else:
                self.ranks[row[0]] = row
        last = self.moves[-1][0] if self.moves else 0
        self.moves += [move for move in frame.get("moves", []) if move[0] > last]
        self.losses = frame.get("losses", self.losses)
        self.samples += frame.get("samples", [])


# Files


async def test_the_page_has_no_script_but_its_own_files_and_relative_urls(start: Start) -> None:
    running = await start()
    async with running.http.get(running.url + "/") as response:
        assert response.status == 200
        policy = response.headers["Content-Security-Policy"]
        text = await response.text()
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert not re.search(r"<script(?![^>]*\ssrc=)|\son\w+=|style=|javascript:", text)
    linked = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert {"/" + url for url in linked} == set(FILES) - {"/page/index.html"}
    for name in ("page.js", "film.js", "charts.js", "common.js"):
        script = (ASSETS / name).read_text()
        assert "innerHTML" not in script
        assert not re.search(r"https?://|eval\(|new Function", script)


@pytest.mark.parametrize("path", FILES)
async def test_each_file_has_its_type_and_is_asked_again_by_its_tag(start: Start, path: str) -> None:
    running = await start()
    async with running.http.get(running.url + path) as response:
        assert response.status == 200
        assert (
            response.content_type
            == {"css": "text/css", "html": "text/html", "js": "text/javascript", "svg": "image/svg+xml"}[
                path.rpartition(".")[2]
            ]
        )
        assert response.headers["X-Content-Type-Options"] == "nosniff"
        tag = response.headers["ETag"]
    async with running.http.get(running.url + path, headers={"If-None-Match": tag}) as response:
        assert response.status == 304


@pytest.mark.parametrize(
    "name", ["nothing.js", "../../settings.py", "%2e%2e/%2e%2e/settings.py", "uplot/README.md", "film/1", ""]
)
async def test_nothing_else_is_served(start: Start, name: str) -> None:
    running = await start()
    async with running.http.get(f"{running.url}/page/{name}") as response:
        assert response.status == 404


def test_the_chart_library_is_the_one_that_is_noted() -> None:
    noted = dict(re.findall(r"\| (\S+) \| ([0-9a-f]{64}) \|", (ASSETS / "uplot" / "README.md").read_text()))
    assert {path.name for path in (ASSETS / "uplot").iterdir()} == {*noted, "README.md", "LICENSE"}
    for name, digest in noted.items():
        assert sha256((ASSETS / "uplot" / name).read_bytes()).hexdigest() == digest


# Keys


async def test_files_are_open_and_what_they_show_needs_the_key(start: Start) -> None:
    running = await start(api_keys=("k1",))
    for path in OPEN_PATHS:
        async with running.http.get(running.url + path) as response:
            assert response.status == 200, path
    for path in ("/page/feed", "/page/layer/0", "/page/film/0/1"):
        async with running.http.get(running.url + path) as response:
            assert response.status == 401, path
        async with running.http.get(running.url + path, headers={"Authorization": "Bearer k1"}) as response:
            assert response.status == (404 if "film" in path else 200), path


@pytest.mark.parametrize("api_keys", [(), ("k1",)])
async def test_with_an_admin_key_it_alone_changes_anything(start: Start, api_keys: tuple[str, ...]) -> None:
    running = await start(api_keys=api_keys, admin_key="boss")
    for path in ACTIONS.values():
        for given, status in ((None, 401), ("k1", 401), ("boss", 200)):
            headers = {"Authorization": f"Bearer {given}"} if given else {}
            body = {"rank": 1, "incarnation": 2, "new_data_parallel_size": 4}
            async with running.http.post(running.url + path, headers=headers, json=body) as response:
                assert response.status == status, (path, given)
    assert running.backend.relaunches == [1]
    assert running.backend.kills == [(1, 2)]
    async with running.http.get(
        running.url + "/v1/models", headers={"Authorization": "Bearer boss"}
    ) as response:
        assert response.status == 200
    async with running.http.get(running.url + "/v1/models") as response:
        assert response.status == (401 if api_keys else 200)


async def test_the_page_has_buttons_only_with_an_admin_key(start: Start) -> None:
    for key, actions in ((None, {}), ("boss", ACTIONS)):
        running = await start(admin_key=key)
        async with asyncio.timeout(DEADLINE_S), running.http.get(running.url + "/page/feed") as response:
            _, frame = frame_of(await response.content.readuntil(b"\n\n"))
        assert frame["about"]["actions"] == actions
        assert "boss" not in json.dumps(frame)


# The feed


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


async def test_whoever_has_had_all_frames_and_who_has_missed_any_know_the_same(metrics: Metrics) -> None:
    """Three pages, one of which never reads until the end, and one at random, of a group that changes at random."""
    dice = random.Random(7)
    backend = FakeBackend(
        engines=tuple(EngineStatus(rank, "healthy", "Serving", 1, 1, 0, 0, "") for rank in range(5))
    )
    feed = Feed(backend, metrics, {})
    pages = [Page(), Page(), Page()]
    async with AsyncExitStack() as stack, asyncio.timeout(DEADLINE_S):
        streams = [await stack.enter_async_context(aclosing(feed.follow())) for _ in pages]
        for page, stream in zip(pages, streams, strict=True):
            page.take(frame_of(await anext(stream))[1])
        for turn in range(60):
            for _ in range(dice.randrange(3)):
                rank = dice.randrange(5)
                engine = replace(
                    backend.engines[rank], running=dice.randrange(3), state=dice.choice(["Failed", "Serving"])
                )
                backend.engines = (*backend.engines[:rank], engine, *backend.engines[rank + 1 :])
                backend.history.moved(rank, 1, engine.state)
                if engine.state == "Failed":
                    backend.history.lost(lambda rank=rank, turn=turn: loss(rank, turn))  # type: ignore[misc]
            if dice.random() < 0.5:
                feed._sample()
            feed._advance()
            pages[0].take(frame_of(await anext(streams[0]))[1])
            if dice.random() < 0.4:
                pages[1].take(frame_of(await anext(streams[1]))[1])
        feed._advance()
        for page, stream in zip(pages, streams, strict=True):
            page.take(frame_of(await anext(stream))[1])
    assert [page.snapshots for page in pages[::2]] == [1, 2]
    assert pages[1].snapshots > 2
    for page in pages:
        assert page.ranks == pages[0].ranks
        assert page.moves == pages[0].moves
        assert page.losses == pages[0].losses
        assert page.samples == pages[0].samples
    assert [row[2] for row in pages[0].ranks.values()] == [engine.state for engine in backend.engines]
    assert len(pages[0].moves) == backend.history.number
    assert feed.pages == 0


async def test_all_that_is_kept_is_bounded(metrics: Metrics) -> None:
    backend = FakeBackend()
    feed = Feed(backend, metrics, {})
    for number in range(MOST_MOVES + 10):
        backend.history.moved(number, 1, "Serving")
        backend.history.lost(lambda number=number: loss(number))  # type: ignore[misc]
        feed._sample()
        if number % 64 == 0:
            await asyncio.sleep(0)
    async with aclosing(feed.follow()) as stream:
        _, frame = frame_of(await anext(stream))
    assert (len(frame["moves"]), len(frame["losses"]), len(frame["samples"])) == (
        MOST_MOVES,
        MOST_LOSSES,
        KEPT_SAMPLES,
    )
    assert frame["moves"][-1][0] == MOST_MOVES + 10


async def test_a_loss_is_told_without_waiting_for_the_next_sample(metrics: Metrics) -> None:
    backend = FakeBackend()
    feed = Feed(backend, metrics, {})  # nobody runs it: there are no samples
    async with asyncio.timeout(DEADLINE_S), aclosing(feed.follow()) as stream:
        await anext(stream)
        backend.history.moved(3, 1, "Failed")
        backend.history.lost(lambda: loss(3))
        _, frame = frame_of(await anext(stream))
    assert [move[2:] for move in frame["moves"]] == [[3, 1, "Failed"]]
    assert frame["losses"][0][0] == 3


def test_a_listener_that_fails_is_not_the_groups_affair() -> None:
    history = History()
    heard = []

    def broken() -> None:
        heard.append(1)
        raise RuntimeError

    history.listen(broken)
    history.moved(0, 1, "Serving")
    history.moved(0, 1, "Failed")
    assert (len(heard), len(history.moves)) == (2, 2)


async def test_there_are_so_many_pages_and_no_more_until_one_leaves(start: Start, metrics: Metrics) -> None:
    feed = Feed(FakeBackend(), metrics, {})
    async with AsyncExitStack() as stack:
        streams = [await stack.enter_async_context(aclosing(feed.follow())) for _ in range(MOST_PAGES)]
        for stream in streams:
            await anext(stream)
        with pytest.raises(TooManyPages):
            await anext(feed.follow())
        await streams[3].aclose()
        async with aclosing(feed.follow()) as another:
            assert frame_of(await anext(another))[1]["snapshot"]
    running = await start()
    async with AsyncExitStack() as stack, asyncio.timeout(DEADLINE_S):
        for _ in range(MOST_PAGES):
            response = await stack.enter_async_context(running.http.get(running.url + "/page/feed"))
            await response.content.readuntil(b"\n\n")
        async with running.http.get(running.url + "/page/feed") as response:
            assert response.status == 503
            assert (await response.json())["error"]["code"] == "too_many_pages"


async def test_streams_end_when_the_server_does(start: Start) -> None:
    running: Running = await start()
    async with asyncio.timeout(DEADLINE_S), running.http.get(running.url + "/page/feed") as response:
        assert response.content_type == "text/event-stream"
        await response.content.readuntil(b"\n\n")
        await running.server.close()
        await response.content.read()  # to its end, and not to an error


async def test_a_layer_is_told_and_one_that_is_not_there_is_not(start: Start) -> None:
    running = await start()
    async with running.http.get(running.url + "/page/layer/1") as response:
        assert (await response.json())["slots"] == [3, -1]
    for wrong in ("2", "-1", "x", "9999999"):
        async with running.http.get(f"{running.url}/page/layer/{wrong}") as response:
            assert response.status == 404


async def test_without_an_event_log_there_are_no_films_and_it_says_why(start: Start) -> None:
    running = await start()
    running.backend.history.lost(lambda: loss(3))
    async with running.http.get(running.url + "/page/film/3/1") as response:
        assert response.status == 404
        assert "--event-log" in (await response.json())["error"]["message"]


# Films: made by a process of their own, of a log that a run has written


async def test_a_film_is_made_of_the_log_and_kept_when_nothing_more_can_come(log: Path) -> None:
    films = Films(log.parent)
    just_lost, long_back = loss(1), loss(1)._replace(back_after_s=1.0)
    first = json.loads(await films.of(just_lost))
    assert [each["rank"] for scene in first["scenes"] for each in scene["losses"]] == [1]
    assert json.loads(await films.of(long_back)) == first
    others = Films(log.parent)
    await others.of(just_lost)
    await asyncio.to_thread(log.unlink)
    assert json.loads(await films.of(long_back)) == first
    with pytest.raises(FilmUnavailable, match="no event log here"):
        await others.of(just_lost)


async def test_a_film_that_nobody_waits_for_any_more_is_not_made_on(log: Path) -> None:
    async with asyncio.timeout(DEADLINE_S):
        films = Films(log.parent)
        asking = asyncio.create_task(films.of(loss(1)))
        await asyncio.sleep(0)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking
        assert json.loads(await films.of(loss(1)))["scenes"]
