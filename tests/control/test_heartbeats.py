"""When a rank says that it lives."""

from __future__ import annotations

from typing import Any

import anyio
import pytest

from elastic_ep.config import EngineLimits, RankConfig
from elastic_ep.control.rank import RankProcess
from elastic_ep.placement import launch_placement

CONFIG = RankConfig(
    rank=0, incarnation=1, num_ranks=2, directory="", model="", load_format="dummy",
    device="cpu", seed=0, limits=EngineLimits(max_model_len=16), heartbeat_ms=200, kernel_wait_ms=500,
    placement=launch_placement(2, 1, 2, 0),
)  # fmt: skip


class Wire:
    def __init__(self) -> None:
        self.sent: list[Any] = []

    def send(self, message: Any) -> None:
        self.sent.append(message)


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("waiting_at", "reported", "said"),
    [(None, False, [False]), (None, True, []), (7, False, [True]), (7, True, [True])],
)
async def test_whoever_parks_says_so_even_after_a_report(
    waiting_at: int | None, reported: bool, said: list[bool]
) -> None:
    """It beats more rarely from then on: whoever has not heard that it is parked takes it for hung."""
    rank, wire = RankProcess(CONFIG, windows_fd=-1, life_fd=-1), Wire()
    rank._wire = wire  # type: ignore[assignment]  # the only part of it that is used
    rank._mailbox.waiting_at = waiting_at
    rank._heard_from = reported
    with anyio.move_on_after(0.01):
        await rank._send_heartbeats()
    assert [beat.parked for beat in wire.sent] == said
