"""A rank process does what its machine says, and ends when that cannot go on."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
import structlog

from elastic_ep.machines.rank.events import DeviceOpened, Started, StepsEnded, WarmedUp
from elastic_ep.wire.messages import Beat, Numbered, RankReport, RankState, Seat, Shutdown, Snapshot, View
from tests.kit.lone_rank import Wire, lone_rank

ALONE = View(1, (Seat(0, 1, 0),))


@pytest.fixture
def plain_tracebacks() -> Iterator[None]:
    """As `logs.configure` has them; to draw one takes tens of milliseconds."""
    shown = structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
    structlog.configure(processors=[structlog.processors.add_log_level, shown])
    yield
    structlog.reset_defaults()


@pytest.mark.anyio
async def test_a_rank_without_an_engine_exits_when_it_is_told_to_stop() -> None:
    wire = Wire()
    rank = lone_rank(wire)
    rank._exit = asyncio.get_running_loop().create_future()
    rank._hear(Started())
    rank._on_direct(Shutdown())
    assert rank._exit.result() == 0
    assert rank._mailbox.stop
    rank._outbox.post(StepsEnded())
    assert wire.sent == [RankReport(RankState.INIT_CUDA)], "the wire is closed or about to be"


@pytest.mark.anyio
@pytest.mark.usefixtures("plain_tracebacks")
async def test_a_rank_whose_machine_cannot_go_on_says_why_and_ends(capfd: pytest.CaptureFixture[str]) -> None:
    """Seated before it is ready: a rank that went on in a state that it does not understand could break a promise."""
    wire = Wire()
    rank = lone_rank(wire)
    rank._exit = asyncio.get_running_loop().create_future()
    for event in (Started(), DeviceOpened(), WarmedUp(), Numbered(1, Beat())):
        rank._hear(event)
    rank._on_direct(Snapshot(1, ALONE, None))
    assert wire.sent[-1] == RankReport(RankState.FAILED, "UnexpectedEvent: rank: no admitted in InitCUDA")
    assert rank._exit.result() == 1
    told = "".join(capfd.readouterr())
    assert "RankMachine heard ['WarmedUp', 0]" in told
    assert "RankMachine cannot take ['Snapshot', 1" in told
    rank._hear(Numbered(2, ALONE))
    assert len(wire.sent) == 3, "nothing follows"
