"""What open pages are told: one frame at a time, made once for all of them.

A page begins with a snapshot and goes on with changes. Nobody has a queue: who has not taken a frame when the next one
is there gets a snapshot instead, however many it has missed. So a page's memory is bounded, and to connect again is the
same as to have missed something. Nothing in a frame comes from a client of the API.
"""

from __future__ import annotations

import asyncio
import os
import platform
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable
from typing import Any, NamedTuple

import msgspec

from elastic_ep.group.metrics import Metrics
from elastic_ep.group.port import Backend, EngineStatus

PERIOD_S = 0.5
"""Between two samples, and between two frames while nothing happens."""
LEAST_PAUSE_S = 0.05
"""Between two frames, whatever happens."""
KEPT_SAMPLES = 1800
"""A quarter of an hour."""
MOST_PAGES = 16


class Sample(NamedTuple):
    """What happened in the time up to `at_ms` (since 1970). Gaps are between deliveries of one stream."""

    at_ms: int
    tokens_per_s: float
    longest_gap_ms: float
    running: int
    waiting: int


class TooManyPages(Exception):
    """There are `MOST_PAGES` already."""


Row = tuple[Any, ...]
"""A rank as the page has it: see `_row`."""


class Feed:
    """On the event loop. `run` samples; without a page nothing else is done."""

    def __init__(
        self,
        backend: Backend,
        metrics: Metrics,
        about: dict[str, Any],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`about`: what does not change, told with each snapshot."""
        self._backend = backend
        self._metrics = metrics
        self._about = about
        self._clock = clock
        self._encode = msgspec.json.Encoder().encode
        self._samples: deque[Sample] = deque(maxlen=KEPT_SAMPLES)
        self._sampled_s = clock()
        self._generated = metrics.flow().generated
        self._host = (platform.node(), os.cpu_count() or 1)
        self.pages = 0
        self._closed = False
        self._number = 0
        """Of the newest frame."""
        self._made_s = float("-inf")
        self._newest = b""
        self._next: asyncio.Future[None] | None = None
        self._hurry: asyncio.TimerHandle | None = None
        # As the newest frame left it with whoever has had all of them.
        self._group: dict[str, Any] = {}
        self._rows: dict[int, Row] = {}
        self._moves_told = 0
        self._losses_told = -1
        self._samples_told = 0
        self._sample_number = 0
        backend.history.listen(self._something_happened)

    async def run(self) -> None:
        """Until it is cancelled."""
        while True:
            await asyncio.sleep(PERIOD_S)
            self._sample()
            if self.pages:
                self._advance()

    def close(self) -> None:
        """Every page's stream ends."""
        self._closed = True
        if self._hurry is not None:
            self._hurry.cancel()
        self._wake()

    async def follow(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events for one page. Raises `TooManyPages` at the first one."""
        if self.pages >= MOST_PAGES:
            raise TooManyPages
        if not self.pages:
            self._advance()
        self.pages += 1
        try:
            seen = self._number
            yield self._snapshot()
            while not self._closed:
                if seen == self._number:
                    await self._another()
                    continue
                frame = self._newest if seen == self._number - 1 else self._snapshot()
                seen = self._number
                yield frame
        finally:
            self.pages -= 1

    # Frames

    def _sample(self) -> None:
        now_s = self._clock()
        flow, load = self._metrics.flow(), self._backend.load()
        rate = (flow.generated - self._generated) / max(1e-3, now_s - self._sampled_s)
        self._sampled_s, self._generated = now_s, flow.generated
        self._sample_number += 1
        self._samples.append(
            Sample(_now_ms(), round(rate, 1), round(flow.longest_gap_s * 1000, 2), load.running, load.waiting)
        )

    def _advance(self) -> None:
        """Make the next frame, and wake who waits for it."""
        if self._hurry is not None:
            self._hurry.cancel()
            self._hurry = None
        self._made_s = self._clock()
        history, status = self._backend.history, self._backend.status()
        changed = []
        for engine in status.engines:
            row = _row(engine)
            if self._rows.get(engine.id) != row:
                self._rows[engine.id] = row
                changed.append(row)
        for gone in self._rows.keys() - {engine.id for engine in status.engines}:
            del self._rows[gone]
            changed.append((gone,))
        moves = history.since(self._moves_told)
        new = min(self._sample_number - self._samples_told, len(self._samples))
        load = self._backend.load()
        self._group = {
            "state": status.state,
            "epoch": status.epoch,
            "step": status.step,
            "tolerates": status.tolerates,
            "idle": status.idle,
            "running": load.running,
            "waiting": load.waiting,
            "placement": self._backend.placement_version(),
            "host": (*self._host, round(os.getloadavg()[0], 2), round(time.process_time(), 2)),
        }
        frame: dict[str, Any] = {"now_ms": _now_ms(), "group": self._group}
        if changed:
            frame["ranks"] = changed
        if moves:
            frame["moves"] = moves
        if history.losses_edition != self._losses_told:
            frame["losses"] = [loss() for loss in history.losses]
        if new > 0:
            frame["samples"] = list(self._samples)[-new:]
        self._moves_told, self._samples_told = history.number, self._sample_number
        self._losses_told = history.losses_edition
        self._number += 1
        self._newest = self._event(frame)
        self._wake()

    def _snapshot(self) -> bytes:
        """All that frames up to the newest have told. A move may be told again by the next one: it has its number."""
        history = self._backend.history
        frame = {
            "snapshot": True,
            "now_ms": _now_ms(),
            "about": self._about,
            "group": self._group,
            "ranks": list(self._rows.values()),
            "moves": list(history.moves),
            "losses": [loss() for loss in history.losses],
            "samples": list(self._samples),
        }
        return self._event(frame)

    def _event(self, frame: dict[str, Any]) -> bytes:
        return b"id: %d\ndata: %s\n\n" % (self._number, self._encode(frame))

    # Who waits

    async def _another(self) -> None:
        if self._next is None or self._next.done():
            self._next = asyncio.get_running_loop().create_future()
        await asyncio.shield(self._next)

    def _wake(self) -> None:
        if self._next is not None and not self._next.done():
            self._next.set_result(None)

    def _something_happened(self) -> None:
        if self.pages and self._hurry is None and not self._closed:
            pause_s = max(0.0, LEAST_PAUSE_S - (self._clock() - self._made_s))
            # Also when the pause is over: what comes of one event belongs into one frame.
            self._hurry = asyncio.get_running_loop().call_later(max(pause_s, 0.005), self._advance)


def _row(engine: EngineStatus) -> Row:
    pages = engine.kv_pages
    return (
        engine.id,
        engine.incarnation,
        engine.state,
        engine.status,
        engine.running,
        engine.waiting,
        pages.device,
        pages.held,
        pages.named,
        pages.shelf,
        pages.shelf_bytes,
    )


def _now_ms() -> int:
    return time.time_ns() // 1_000_000
