"""The watch over progress goes on whatever the kernel does with who asks it about a process."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any, cast

import anyio
import pytest

from elastic_ep.group.processes import RankProcesses
from elastic_ep.group.watch import ProgressWatch, RankFacts
from elastic_ep.machines.membership.events import GroupState
from elastic_ep.machines.membership.progress import Pulse, Starved
from elastic_ep.wire.messages import Heartbeat, Member

pytestmark = pytest.mark.anyio
MEMBER = Member(1, 1)


class Kernel:
    """Keeps the first who asks until `free`; the others are told at once."""

    def __init__(self) -> None:
        self.free = threading.Event()
        self._asked = 0

    def sample(self, pids: Mapping[Member, int]) -> tuple[Starved, ...]:
        assert pids == {MEMBER: 4711}
        self._asked += 1
        if self._asked == 1:
            self.free.wait()
        return (Starved(MEMBER, 7),)


@pytest.fixture
def kernel() -> Iterator[Kernel]:
    kernel = Kernel()
    yield kernel
    kernel.free.set()


async def test_a_kernel_that_keeps_who_asks_delays_no_later_pulse(kernel: Kernel) -> None:
    pulses: list[Pulse] = []
    heard = anyio.Event()

    def post(_name: str, pulse: Pulse) -> None:
        pulses.append(pulse)
        if len(pulses) == 2:
            heard.set()

    processes = RankProcesses(cast(Any, None), cast(Any, None), None)
    processes._starvation = cast(Any, kernel)
    rests: list[float] = []
    watch = ProgressWatch(
        cast(Any, SimpleNamespace(attach=lambda *_, **__: None, post=post)),
        cast(Any, SimpleNamespace(rest=rests.append, held_up_ms=lambda: 0, now_ms=lambda: 0)),
        cast(
            Any,
            SimpleNamespace(
                group_state=GroupState.PAUSED, records={}, view=SimpleNamespace(members=[MEMBER])
            ),
        ),
        cast(Any, SimpleNamespace(doubtful=lambda: [MEMBER])),
        {MEMBER: RankFacts(pid=4711)},
        cast(Any, None),
        cast(Any, SimpleNamespace(pulse_ms=20, calm_factor=3)),
        lambda *_: None,
        processes.starved,
    )
    watch.heard(MEMBER, Heartbeat(1, 5, 1, None, False))
    with anyio.fail_after(20):
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(watch.run)
            await heard.wait()
            tasks.cancel_scope.cancel()
    assert [pulse.starved for pulse in pulses] == [(), (Starved(MEMBER, 7),)]
    assert [len(pulse.beats) for pulse in pulses] == [1, 0], "a sign of life is of one pulse"
    assert set(rests) == {0.06}, "a group that is parked is looked at more rarely"
