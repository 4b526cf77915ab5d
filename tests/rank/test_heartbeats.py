"""When a rank says that it lives."""

from __future__ import annotations

from dataclasses import replace

import anyio
import pytest

from elastic_ep.timing import Timing
from elastic_ep.wire.messages import Heartbeat, StepReport
from tests.kit.lone_rank import CONFIG, Wire, lone_rank

REPORT = StepReport(
    step=6, epoch=1, started_ns=0, ended_ns=1, tokens=(), running=0, waiting=0,
    operations=0, cpu_ms=0,
)  # fmt: skip


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
    if reported:
        rank._reported.set()
    with anyio.move_on_after(0.01):
        await rank._send_heartbeats()
    assert [beat.parked for beat in wire.sent] == said


@pytest.mark.anyio
async def test_a_report_after_the_word_of_parking_is_followed_by_another() -> None:
    """At once, not after a parked rank's long pause: the newest sign counts, and a report says nothing of parking."""
    wire = Wire()
    rank = lone_rank(wire)
    rank._config = replace(CONFIG, timing=Timing(hang_deadline_ms=3_600_000))
    rank._mailbox.waiting_at = 7
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(rank._send_heartbeats)
        await anyio.wait_all_tasks_blocked()
        rank._outbox.post(REPORT)
        await anyio.wait_all_tasks_blocked()
        tasks.cancel_scope.cancel()
    assert [isinstance(sign, Heartbeat) and sign.parked for sign in wire.sent] == [True, False, True]
