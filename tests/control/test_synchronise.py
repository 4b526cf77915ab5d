"""A rank that is behind asks for a snapshot at its own pace, however often it learns that it is behind."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from elastic_ep.config import EngineLimits, RankConfig
from elastic_ep.control.rank import SYNC_RETRY_S, RankProcess
from elastic_ep.machines.member import AskSnapshot
from elastic_ep.messages import SnapshotRequest
from elastic_ep.placement import launch_placement

CONFIG = RankConfig(
    rank=0, incarnation=1, num_ranks=2, directory="", model="", load_format="dummy",
    device="cpu", seed=0, limits=EngineLimits(max_model_len=16), heartbeat_ms=200, kernel_wait_ms=500,
    placement=launch_placement(2, 1, 2, 0),
)  # fmt: skip
BEATS = 2_000


class Wire:
    def __init__(self) -> None:
        self.sent: list[Any] = []

    def send(self, message: Any) -> None:
        self.sent.append(message)


@pytest.mark.anyio
async def test_a_storm_of_beats_makes_no_storm_of_requests() -> None:
    """Every answer comes with a beat to all, so requests that follow beats at once feed each other for ever."""
    rank, wire = RankProcess(CONFIG, windows_fd=-1, life_fd=-1), Wire()
    rank._wire = wire  # type: ignore[assignment]  # the only part of it that is used
    started = anyio.current_time()
    with anyio.fail_after(30):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(rank._synchronise)
            for _ in range(BEATS):
                rank._perform([AskSnapshot()])
                await anyio.lowlevel.checkpoint()
            while len(wire.sent) < 2:  # it goes on asking until it is answered
                await anyio.lowlevel.checkpoint()
            tasks.cancel_scope.cancel()
    most = (anyio.current_time() - started) / SYNC_RETRY_S + 2
    assert set(wire.sent) == {SnapshotRequest(0, 1)}
    assert len(wire.sent) <= most
