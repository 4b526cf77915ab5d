"""When a rank says that it lives."""

from __future__ import annotations

import anyio
import pytest
from lone_rank import Wire, lone_rank


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("waiting_at", "reported", "said"),
    [(None, False, [False]), (None, True, []), (7, False, [True]), (7, True, [True])],
)
async def test_whoever_parks_says_so_even_after_a_report(
    waiting_at: int | None, reported: bool, said: list[bool]
) -> None:
    """It beats more rarely from then on: whoever has not heard that it is parked takes it for hung."""
    wire = Wire()
    rank = lone_rank(wire)
    rank._mailbox.waiting_at = waiting_at
    rank._heard_from = reported
    with anyio.move_on_after(0.01):
        await rank._send_heartbeats()
    assert [beat.parked for beat in wire.sent] == said
