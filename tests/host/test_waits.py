"""Whatever waits for ranks hears of deaths: it is answered when the last rank has answered or is known to be dead."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest

from elastic_ep.group.expert_status import verify
from elastic_ep.group.port import Verification
from elastic_ep.timing import USUAL
from elastic_ep.wire.messages import Member
from elastic_ep.wire.slot_messages import SumSlots
from tests.kit.fake_group import FakeGroup, FakeRank
from tests.kit.virtual_time import VirtualTimeLoop, run_virtually

AUDIT_S = USUAL.audit_ms / 1000


def verifying(main: Any, **shape: int) -> FakeGroup:
    async def run(loop: VirtualTimeLoop) -> FakeGroup:
        group = FakeGroup(loop, **shape)
        group.launch()
        await group.until(lambda: group.all_serve, "all ranks serve")
        await asyncio.sleep(0.1)
        await main(group)
        return group

    return run_virtually(run)


def ask(group: FakeGroup) -> asyncio.Task[Verification]:
    repairs = group.controller.repairs
    return asyncio.create_task(
        verify(repairs.placement, group.controller.machine.view.members, repairs.audit, AUDIT_S)
    )


@pytest.mark.parametrize("seed", range(40))
def test_verify_is_answered_when_the_last_death_is_known(seed: int) -> None:
    """Ranks answer at once, late, or die first, some with the last copy of an expert, or all."""
    choose = random.Random(seed)
    ranks = choose.randrange(1, 6)
    dying = set(choose.sample(range(ranks), choose.randrange(ranks + 1)))
    late = {rank: choose.choice([0.0, 0.3, 5.0]) for rank in range(ranks)}

    async def main(group: FakeGroup) -> None:
        questions: list[tuple[FakeRank, SumSlots]] = []

        def loses(rank: FakeRank, message: Any) -> bool:
            if isinstance(message, SumSlots) and rank.member.incarnation == 1:
                questions.append((rank, message))
                return True
            return False

        group.loses = loses
        task, began_s = ask(group), group.loop.time()
        await asyncio.sleep(0)
        due_s = 0.0
        for rank, question in questions:
            number = rank.member.rank
            due_s = max(due_s, late[number])
            if number in dying:
                group.loop.call_later(late[number], group.end, rank.member, "signal 9")
            else:
                group.loop.call_later(late[number], rank._hear, question)
        assert len(questions) == ranks
        found = await task
        assert group.loop.time() - began_s <= due_s + 0.01
        assert found.silent == tuple(sorted(dying))
        assert not found.differ
        assert not group.controller.repairs.audit._awaited

    verifying(main, ranks=ranks, experts=5, redundant=0, relaunch_limit=10)


def test_a_rank_that_lives_and_does_not_answer_is_silent_after_the_deadline() -> None:
    async def main(group: FakeGroup) -> None:
        group.loses = lambda rank, message: rank.member == Member(1, 1) and isinstance(message, SumSlots)
        began_s = group.loop.time()
        found = await ask(group)
        assert found.silent == (1,)
        assert AUDIT_S <= group.loop.time() - began_s <= AUDIT_S + 1

    verifying(main)


def test_questions_that_nobody_waits_for_leave_nothing_behind() -> None:
    async def main(group: FakeGroup) -> None:
        audit = group.controller.repairs.audit
        task = ask(group)
        await asyncio.sleep(0)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        for _ in range(100):
            audit.ask(group.controller.machine.view.members)
        await asyncio.sleep(0.1)
        assert not audit._awaited
        assert not audit._lost

    verifying(main)
