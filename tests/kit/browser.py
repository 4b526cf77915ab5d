"""A headless Chromium for tests and benches of the page."""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from playwright.async_api import Browser, Page, async_playwright

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
NONE = "no Chromium on this machine: on Debian apt-get install chromium"


def chromium() -> str | None:
    """None: there is none."""
    return next(filter(None, map(shutil.which, PROGRAMS)), None)


@dataclass
class Tab:
    """`complaints`: errors of scripts, what the page's policy forbids, requests to somewhere else."""

    page: Page
    url: str
    complaints: list[str] = field(default_factory=list)

    async def open(self) -> None:
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on(
            "console", lambda line: self.complaints.extend([line.text] if "Policy" in line.text else [])
        )
        self.page.on(
            "request",
            lambda sent: self.complaints.extend([] if sent.url.startswith(self.url) else [sent.url]),
        )
        await self.page.goto(self.url)


@asynccontextmanager
async def browser() -> AsyncIterator[Browser]:
    program = chromium()
    assert program is not None, NONE
    async with async_playwright() as player:
        # The sandbox needs rights that a container's root lacks; what is opened is ours.
        running = await player.chromium.launch(executable_path=program, args=["--no-sandbox"])
        try:
            yield running
        finally:
            await running.close()


@asynccontextmanager
async def tab(
    running: Browser, url: str, width: int = 1000, height: int = 700, scheme: str = "dark"
) -> AsyncIterator[Tab]:
    page = await running.new_page(
        viewport={"width": width, "height": height}, color_scheme="light" if scheme == "light" else "dark"
    )
    opened = Tab(page, url)
    try:
        await opened.open()
        yield opened
    finally:
        await page.close()
