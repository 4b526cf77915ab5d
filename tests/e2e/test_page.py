"""The page in a real browser: losses of real ranks, their film, keys, and hundreds of ranks."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from elastic_ep.gateway.app import Server, create_app, serve
from elastic_ep.gateway.page.feed import Feed
from elastic_ep.gateway.prepared import prepare
from elastic_ep.gateway.settings import ApiSettings
from elastic_ep.group.metrics import Metrics
from tests.gateway.conftest import settings
from tests.gateway.fakes import sample_text
from tests.kit.browser import NONE, Tab, browser, chromium, tab
from tests.kit.served import Server as Serving
from tests.kit.served import chat, http, server, status, until_full
from tests.kit.simulated_group import SimulatedGroup

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.anyio,
    pytest.mark.timeout(150),
    pytest.mark.skipif(chromium() is None, reason=NONE),
]
DEADLINE_MS = 20_000.0
RANKS = 2


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def text_of(opened: Tab, selector: str) -> str:
    return await opened.page.inner_text(selector, timeout=DEADLINE_MS)


async def until_live(opened: Tab) -> None:
    await opened.page.wait_for_selector("#link.up", timeout=DEADLINE_MS)


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Serving]:
    with server(["--ranks", str(RANKS)], tmp_path) as running:
        yield running


async def test_a_loss_is_on_the_page_and_its_film_plays(serving: Serving) -> None:
    async with http() as session, browser() as chrome, tab(chrome, f"{serving.url}/") as opened:
        before = await until_full(session, serving.url)
        await until_live(opened)
        assert f"{RANKS}" in await text_of(opened, "#tiles")
        assert await text_of(opened, "#losses td.none") == "No rank has been lost."
        long: dict[str, Any] = {"max_tokens": 200, "ignore_eos": True}
        streams = [
            asyncio.create_task(chat(session, serving.url, f"Tom has {n} apples.", **long)) for n in range(6)
        ]
        while sum(engine["running"] for engine in (await status(session, serving.url))["engines"]) < 6:
            await asyncio.sleep(0.02)
        os.kill(before["engines"][1]["pid"], signal.SIGKILL)
        row = await opened.page.wait_for_selector('tr[data-loss="1.1"]', timeout=DEADLINE_MS)
        assert row is not None
        await opened.page.wait_for_function(
            """() => document.querySelector('tr[data-loss="1.1"] .cause').textContent === 'killed'""",
            timeout=DEADLINE_MS,
        )
        await asyncio.gather(*streams)
        await until_full(session, serving.url, beyond={1: 1})
        await opened.page.click('tr[data-loss="1.1"]')
        await opened.page.wait_for_selector("#screen .marks li", timeout=DEADLINE_MS)
        marks = await text_of(opened, "#screen .marks")
        assert "death of rank 1.1 noticed" in marks
        assert "rank 1.2 serves again" in marks
        assert "went on elsewhere" in await text_of(opened, "#screen .story")
        assert await opened.page.locator("#actions button").count() == 0
        assert opened.complaints == []


@pytest.fixture
async def simulated(anyio_backend: str) -> AsyncIterator[tuple[SimulatedGroup, ApiSettings, list[Server]]]:
    """256 ranks, which need an API key; and the server, which the test may replace."""
    group = SimulatedGroup(256, experts=32, layers=3)
    chosen = settings(api_keys=("k1",), admin_key="boss")
    await asyncio.to_thread(prepare, chosen)
    app = create_app(group, chosen, sample_text(), Metrics(), sample_text)
    servers = [await serve(app, "127.0.0.1", 0, grace_s=0.1)]
    yield group, chosen, servers
    await servers[-1].close()


async def test_hundreds_of_ranks_keys_and_a_server_that_comes_back(
    simulated: tuple[SimulatedGroup, ApiSettings, list[Server]],
) -> None:
    group, chosen, servers = simulated
    async with browser() as chrome, tab(chrome, f"{servers[0].url}/") as opened:
        page = opened.page
        await page.fill("#key", "wrong", timeout=DEADLINE_MS)
        await page.click("#askform button")
        await page.wait_for_function("() => document.querySelector('#key').value === ''", timeout=DEADLINE_MS)
        await page.fill("#key", "k1")
        await page.click("#askform button")
        await until_live(opened)
        assert "of 256" in await text_of(opened, "#tiles")
        group.lose(77)
        await page.wait_for_selector('tr[data-loss="77.1"]', timeout=DEADLINE_MS)
        # What only who has the admin key may do.
        await page.click("#actions button >> nth=0")
        await page.click("#sure button >> text=Cancel", timeout=DEADLINE_MS)
        await page.click("#actions button >> nth=0")
        for key, outcome in (
            ("wrong", ".failed:has-text('admin key')"),
            ("boss", ".done:has-text('Launched')"),
        ):
            assert group.relaunches == []
            await page.fill("#sure input", key, timeout=DEADLINE_MS)
            await page.click("#sure .yes")
            await page.wait_for_selector(f"#sure {outcome}", timeout=DEADLINE_MS)
        assert group.relaunches == [None]
        await page.click("#sure button >> text=Close")
        # One rank by itself. What is confirmed is about the incarnation that was seen.
        await page.fill("#which input", "200")
        await page.press("#which input", "Enter")
        await page.click("#rank button >> text=Kill", timeout=DEADLINE_MS)
        await page.click("#sure .yes", timeout=DEADLINE_MS)
        await page.wait_for_selector("#sure .done:has-text('being killed')", timeout=DEADLINE_MS)
        await page.click("#sure button >> text=Close")
        await page.wait_for_selector('tr[data-loss="200.1"]', timeout=DEADLINE_MS)
        await page.wait_for_selector("#rank button >> text=Relaunch", timeout=DEADLINE_MS)
        assert await page.locator("#rank button >> text=Kill").count() == 0
        group.change(200, "Serving", 2)
        await page.click("#rank button >> text=Kill", timeout=DEADLINE_MS)
        group.lose(200)
        group.change(200, "Serving", 3)
        await page.click("#sure .yes", timeout=DEADLINE_MS)
        await page.wait_for_selector("#sure .done:has-text('200.3 is there by now')", timeout=DEADLINE_MS)
        await page.click("#sure button >> text=Close")
        await page.click("#rank button >> text=Drain")
        await page.click("#sure .yes", timeout=DEADLINE_MS)
        await page.wait_for_selector("#sure .done:has-text('It drains')", timeout=DEADLINE_MS)
        await page.click("#sure button >> text=Close")
        await page.wait_for_selector("#rank dd:has-text('Draining')", timeout=DEADLINE_MS)
        assert await page.locator("#rank button >> text=Drain").count() == 0
        await page.click("#rank button >> text=Close")
        assert group.drains == [(200, 120)]
        await page.click("#actions button >> text=Scale")
        for size, outcome in (
            (300, ".failed:has-text('must be from 4 to 8')"),
            (4, ".done:has-text('Scaled to 4')"),
        ):
            await page.fill("#sure input[type=number]", str(size), timeout=DEADLINE_MS)
            await page.click("#sure .yes")
            await page.wait_for_selector(f"#sure {outcome}", timeout=DEADLINE_MS)
        await page.click("#sure button >> text=Close")
        assert group.sizes == [(4, 120)]
        group.change(200, "Serving", 3)
        # The server says nothing, and its connection stays.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Feed, "_advance", lambda _: None)
            await page.wait_for_selector("#stale:has-text('Not up to date')", timeout=DEADLINE_MS)
            assert await text_of(opened, "#group") == "unknown"
            assert await page.is_disabled("#actions button >> nth=0")
        await page.wait_for_selector("#stale", state="hidden", timeout=DEADLINE_MS)
        await until_live(opened)
        # The server goes, and another one comes at its place, with what it knows.
        await servers[0].close()
        await page.wait_for_selector("#link.down", timeout=DEADLINE_MS)
        await page.wait_for_selector("#stale:has-text('Not up to date')", timeout=DEADLINE_MS)
        assert await text_of(opened, "#group") == "unknown"
        group.lose(78)
        app = create_app(group, chosen, sample_text(), Metrics(), sample_text)
        servers.append(await serve(app, "127.0.0.1", servers[0].port, grace_s=0.1))
        await until_live(opened)
        await page.wait_for_selector('tr[data-loss="78.1"]', timeout=DEADLINE_MS)
        assert await page.is_hidden("#stale")
        assert await text_of(opened, "#group") == "Degraded"
        assert await page.locator("tr[data-loss]").count() == 4
        assert opened.complaints == []
