"""A rank's next incarnation is heard of as a joiner when nothing of its dead ones is on the device any more."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_ep.host import device_guard as guard_module
from elastic_ep.host.device_guard import DeviceGuard
from elastic_ep.wire.messages import Member
from tests.kit.virtual_time import VirtualTimeLoop, run_virtually

DRAIN_S = 2.0
TAKES_BACK_S = 0.5


class FakeHold:
    """What a process has open, until the driver has taken all of it back."""

    open_of: ClassVar[Counter[int]] = Counter()
    """By process."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.complete = pid % 2 == 0
        self.files = 3
        self.open_of[pid] += 1

    def __len__(self) -> int:
        return self.files

    def release(self) -> None:
        if self.files:
            self.files = 0
            self.open_of[self.pid] -= 1


async def on_another_thread(loop: VirtualTimeLoop, work: Any, *given: Any) -> None:
    await asyncio.sleep(TAKES_BACK_S)
    work(*given)


MOVES = st.lists(
    st.tuples(st.sampled_from(["dies", "dies", "waits", "again", "time"]), st.integers(0, 1)), max_size=14
)


@given(moves=MOVES)
@settings(max_examples=100, deadline=None)
def test_no_incarnation_is_let_in_while_any_old_one_drains(moves: list[tuple[str, int]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FakeHold, "open_of", Counter())
        patch.setattr(guard_module, "DeviceFiles", FakeHold)
        run_virtually(lambda loop: lives_and_deaths(loop, patch, moves))


async def lives_and_deaths(
    loop: VirtualTimeLoop, patch: pytest.MonkeyPatch, moves: list[tuple[str, int]]
) -> None:
    def run_in_executor(_executor: None, work: Any, *given: Any) -> asyncio.Task[None]:
        return loop.create_task(on_another_thread(loop, work, *given))

    patch.setattr(loop, "run_in_executor", run_in_executor)
    incarnations = Counter({0: 1, 1: 1})
    dead: dict[int, set[int]] = {0: set(), 1: set()}
    let_in: list[int] = []
    asked = 0
    died_at: dict[int, float] = {}

    def check(rank: int) -> None:
        let_in.append(rank)
        for pid in dead[rank]:
            assert FakeHold.open_of[pid] == 0, "what a dead incarnation has is on the device still"
            assert loop.time() >= died_at[pid] + DRAIN_S, "its kernels may run still"

    with DeviceGuard(DRAIN_S, lambda kind, /, **facts: None) as guard:
        for move, rank in moves:
            member = Member(rank, incarnations[rank])
            pid = 100 * rank + 10 * member.incarnation
            match move:
                case "dies":
                    for _ in range(2):
                        guard.keep(member, pid)
                    guard.keep(member, pid + 1)
                    for _ in range(2):
                        guard.gone(member)
                    dead[rank] |= {pid, pid + 1}
                    died_at[pid] = died_at[pid + 1] = loop.time()
                    incarnations[rank] += 1
                case "again":
                    guard.gone(Member(rank, max(1, member.incarnation - 1)))
                case "waits":
                    asked += 1
                    before = len(let_in)
                    guard.when_free(rank, lambda rank=rank: check(rank))  # type: ignore[misc]  # bound now
                    free = all(FakeHold.open_of[pid] == 0 for pid in dead[rank])
                    assert len(let_in) == before + free
                case "time":
                    await asyncio.sleep(0.9)
        await asyncio.sleep(DRAIN_S + TAKES_BACK_S + 0.1)
        assert len(let_in) == asked, "somebody is never let in"
        assert not +FakeHold.open_of, "what dead processes had is kept for ever"


def test_nothing_is_let_go_on_the_loops_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even on exit: it takes the driver tenths of a second."""
    monkeypatch.setattr(FakeHold, "open_of", Counter())
    monkeypatch.setattr(guard_module, "DeviceFiles", FakeHold)
    elsewhere = [False]
    released: list[int] = []
    let_go = FakeHold.release

    def release(hold: FakeHold) -> None:
        assert elsewhere[-1], "on the loop's thread"
        released.append(hold.pid)
        let_go(hold)

    monkeypatch.setattr(FakeHold, "release", release)

    async def main(loop: VirtualTimeLoop) -> None:
        def run_in_executor(_executor: None, work: Any, *given: Any) -> asyncio.Future[None]:
            elsewhere.append(True)
            work(*given)
            elsewhere.pop()
            done = loop.create_future()
            done.set_result(None)
            return done

        monkeypatch.setattr(loop, "run_in_executor", run_in_executor)
        with DeviceGuard(DRAIN_S, lambda kind, /, **facts: None) as guard:
            for rank in range(3):
                for _ in range(2):  # what was kept first is let go
                    guard.keep(Member(rank, 1), 100 * rank)
            guard.gone(Member(0, 1))
            assert sum(FakeHold.open_of.values()) == 3
        assert not +FakeHold.open_of
        await asyncio.sleep(2 * DRAIN_S)  # a drain that was under way finds nothing left to do

    run_virtually(main)
    assert sorted(released) == [0, 0, 100, 100, 200, 200]
