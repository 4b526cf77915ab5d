"""The controller's watch over progress, and all its other deadlines, when the machine or the run process stands still."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from elastic_ep.wire.messages import Heartbeat, Member, Prepare, RankState
from tests.kit.fake_group import FakeGroup
from tests.kit.virtual_time import VirtualTimeLoop, run_virtually

BEAT_S = 0.1


async def beats(group: FakeGroup) -> None:
    """Every rank that is not silent beats."""
    while True:
        await asyncio.sleep(BEAT_S)
        for rank in list(group.ranks.values()):
            rank.say(Heartbeat(0, int(group.loop.time() * 1000), 0, None, False))


def watched(main: Callable[[FakeGroup], Coroutine[Any, Any, None]], **shape: Any) -> FakeGroup:
    async def run(loop: VirtualTimeLoop) -> FakeGroup:
        group = FakeGroup(loop, **shape)
        group.launch()
        tasks = [
            asyncio.create_task(group.controller.watch.run()),
            asyncio.create_task(beats(group)),
        ]
        await group.until(lambda: group.all_serve, "all ranks serve")
        await main(group)
        for task in tasks:
            task.cancel()
        return group

    return run_virtually(run)


@pytest.mark.parametrize("seed", range(20))
def test_pauses_of_the_whole_machine_fence_nobody_and_a_hang_is_found_all_the_same(seed: int) -> None:
    """Of any length, at any moment; ranks connect and copies are made meanwhile."""
    choose = random.Random(seed)

    async def main(group: FakeGroup) -> None:
        for _ in range(12):
            if choose.random() < 0.3:
                group.kill(choose.randrange(3))
            await asyncio.sleep(choose.uniform(0, 0.3))
            group.loop.stand_still(choose.choice([0.05, 0.3, 0.9, 20.0, 4000.0]))
        await group.until(lambda: group.all_serve, "all serve", 5.0)
        await asyncio.sleep(2.0)
        assert group.processes.fenced == []
        group.ranks[1].silent = True
        victim, began_s = group.ranks[1].member, group.loop.time()
        await group.until(lambda: group.processes.fenced == [victim], "the hang is found", 1.2)
        assert group.loop.time() - began_s > 0.6, "and not at once"
        await group.until(lambda: group.all_serve, "it is back")

    watched(main, relaunch_limit=1000)


def test_a_joiner_that_could_not_run_is_not_fenced_for_being_late() -> None:
    async def main(group: FakeGroup) -> None:
        prepared = asyncio.Event()

        def loses(rank: Any, message: Any) -> bool:
            if isinstance(getattr(message, "body", None), Prepare):
                prepared.set()
                return group.ranks[1].machine.stage is RankState.INIT_DIST or rank.member == Member(1, 2)
            return False

        group.loses = loses
        group.kill(1)
        await prepared.wait()
        group.loop.stand_still(30.0)
        before = len(group.log.recorded)
        await asyncio.sleep(0.2)
        assert group.processes.fenced == []
        assert len(group.log.recorded) - before < 40, (
            "it wakes up again and again before the deadline has come"
        )

    watched(main)
