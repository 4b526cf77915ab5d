"""A rank that is behind asks for a snapshot at its own pace, however often it learns that it is behind."""

from __future__ import annotations

import anyio
import pytest

from elastic_ep.timing import USUAL
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
