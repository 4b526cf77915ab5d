"""A rank that is behind asks for a snapshot at its own pace, however often it learns that it is behind."""

from __future__ import annotations

from dataclasses import replace

import anyio
import pytest

from elastic_ep.timing import USUAL, Timing
from elastic_ep.wire.messages import Beat, Numbered, SnapshotRequest
from tests.kit.lone_rank import Wire, lone_rank

BEATS = 2_000


@pytest.mark.anyio
async def test_a_storm_of_beats_makes_no_storm_of_requests() -> None:
    """Every answer comes with a beat to all, so requests that follow beats at once feed each other for ever."""
    wire = Wire()
    rank = lone_rank(wire)
    started = anyio.current_time()
    with anyio.fail_after(30):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(rank._synchronise)
            for _ in range(BEATS):
                rank._hear(Numbered(1, Beat()))
                await anyio.lowlevel.checkpoint()
            while len(wire.sent) < 2:  # it goes on asking until it is answered
                await anyio.lowlevel.checkpoint()
            tasks.cancel_scope.cancel()
    most = (anyio.current_time() - started) / USUAL.sync_retry_ms * 1000 + 2
    assert set(wire.sent) == {SnapshotRequest()}
    assert len(wire.sent) <= most


@pytest.mark.anyio
async def test_who_hears_nothing_that_is_published_asks_by_the_other_way_until_it_does() -> None:
    """A connection to another host may have broken in silence: a loss that the others hear of would hold them all up."""
    asked = anyio.Event()
    wire = Wire(lambda _message: asked.set())
    rank = lone_rank(wire)
    rank._config = replace(rank._config, timing=Timing(hang_deadline_ms=200))
    beat_s = rank._config.timing.beat_ms / 1000
    with anyio.fail_after(10):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(rank._doubt_quiet)
            started = anyio.current_time()
            await asked.wait()
            assert anyio.current_time() - started >= USUAL.calm_factor * beat_s, (
                "as long as beats may be apart"
            )
            asked = anyio.Event()
            await asked.wait()
            rank._on_published(Numbered(0, Beat()))
            assert rank._quiet_beats == 0
            tasks.cancel_scope.cancel()
    assert set(wire.sent) == {SnapshotRequest()}
