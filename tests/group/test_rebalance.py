"""Each call to rebalance tells of its own plan, whatever became of the one before."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Any, cast

import anyio.to_process
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_ep.group.hub import Hub
from elastic_ep.group.metrics import Metrics
from elastic_ep.group.port import Rebalancing
from elastic_ep.group.rebalance import Rebalancer
from elastic_ep.group.repairs import Repairs
from elastic_ep.machines.experts.events import (
    Copied,
    Event,
    MembersChanged,
    PlanEnded,
    Planned,
    Seen,
)
from elastic_ep.machines.experts.planner import Plan
from elastic_ep.machines.experts.repair import RepairMachine
from elastic_ep.placement import launch_placement
from elastic_ep.timing import USUAL, RepairConfig
from elastic_ep.wire.messages import Member, PlacementChanged
from elastic_ep.wire.slot_messages import CopySlot
from tests.kit.fake_group import FakeLog
from tests.kit.virtual_time import VirtualTimeLoop, run_virtually

RANKS = 4
MEMBERS = tuple(Member(rank, 1) for rank in range(RANKS))


class Ranks:
    """`ControllerWire`: all see a placement at once, and carry an order out only when they are told to."""

    def __init__(self, loop: VirtualTimeLoop, feed: Callable[[Event], None]) -> None:
        self._loop = loop
        self._feed = feed
        self.orders: list[tuple[Member, CopySlot]] = []

    def publish(self, changed: PlacementChanged) -> None:
        for member in MEMBERS:
            self._loop.call_soon(self._feed, Seen(member, changed.version))

    def send(self, member: Member, message: Any) -> None:
        if isinstance(message, CopySlot):
            self.orders.append((member, message))


class Nobody:
    """The membership machine, and its shell."""

    now_ms = 0

    def step(self, event: Any) -> list[Any]:
        return []

    def at_once(self, effects: Sequence[Any]) -> None:
        pass

    def perform(self, event: Any, effects: Sequence[Any]) -> None:
        pass


class SlowRepairs(Repairs):
    def __init__(self, loop: VirtualTimeLoop) -> None:
        self.ended: list[PlanEnded] = []
        self.planned: list[Planned] = []
        self.ranks = Ranks(loop, self.feed)
        hub = Hub(self._record, lambda: int(loop.time() * 1000))
        hub.attach("membership", Nobody(), Nobody(), clocked=False)
        machine = RepairMachine(launch_placement(RANKS, 1, 4, 4, 1), RepairConfig())
        super().__init__(hub, machine, cast(Any, self.ranks), cast(Any, FakeLog()), Metrics())
        self.feed(MembersChanged(MEMBERS))

    def _record(self, machine: str, event: object, effects: Sequence[Any], cause: int = 0) -> None:
        if isinstance(event, Planned):
            self.planned.append(event)
        self.ended += [effect for effect in effects if isinstance(effect, PlanEnded)]

    def work(self) -> bool:
        """One order is carried out."""
        if not self.ranks.orders:
            return False
        member, order = self.ranks.orders.pop(0)
        self.feed(Copied(member, order.ticket, order.logical))
        return True


def turned_by(placement: Any, ranks: int) -> Plan:
    """Each rank is to hold what the rank so many further on holds now."""
    row = placement.slots[0]
    shift = ranks * placement.slots_per_rank
    return Plan(slots=(row[shift:] + row[:shift],), moves=RANKS, imbalance_before=2.0, imbalance=1.0)


ASKERS = st.lists(st.sampled_from(["waits", "leaves", "is slow"]), min_size=1, max_size=5)


@given(askers=ASKERS, turns=st.lists(st.integers(1, 3), min_size=5, max_size=5))
@settings(max_examples=60, deadline=None)
def test_each_call_tells_of_its_own_plan(askers: list[str], turns: list[int]) -> None:
    """Some askers leave while their plan is under way, some plans take longer than anybody waits."""
    with pytest.MonkeyPatch.context() as patch:
        run_virtually(lambda loop: ask_in_turn(loop, patch, askers, turns))


async def ask_in_turn(
    loop: VirtualTimeLoop, patch: pytest.MonkeyPatch, askers: list[str], turns: list[int]
) -> None:
    repairs = SlowRepairs(loop)
    reported: list[Rebalancing] = []
    asker = Rebalancer(repairs, lambda: frozenset(MEMBERS), every=0, spare=1, report=reported.append)

    async def planned(_call: object, **_options: object) -> Plan:
        return turned_by(repairs.placement, turns[len(repairs.planned)])

    patch.setattr(anyio.to_process, "run_sync", planned)
    for asked, how in enumerate(askers, start=1):
        call = asyncio.create_task(asker.rebalance())
        while len(repairs.planned) < asked:
            await asyncio.sleep(0)
        if how == "leaves":
            for _ in range(asked % 3):
                repairs.work()
                await asyncio.sleep(0)
            call.cancel()
            await asyncio.wait([call])
            continue
        if how == "is slow":
            await asyncio.sleep(USUAL.carry_out_ms / 1000 + 1.0)
            assert call.done(), "nobody waits for ever"
        while not call.done():
            repairs.work()
            await asyncio.sleep(0)
        done = call.result()
        assert reported[-1] == done
        own = [ended for ended in repairs.ended if ended.plan == asked]
        assert done.made == (own[0].made if own else 0), (
            f"call {asked} tells of another plan: {repairs.ended}"
        )
        assert how == "is slow" or own, "it was answered before its plan had ended"
        assert done.planned == RANKS
    assert [ended.plan for ended in repairs.ended] == sorted({ended.plan for ended in repairs.ended})


@pytest.mark.parametrize("left", [3, 1, 0])
def test_a_call_is_answered_when_a_member_dies(left: int) -> None:
    """Its plan is for others than there are. With nobody left there is nothing to plan, and nothing to wait for."""

    async def main(loop: VirtualTimeLoop) -> None:
        repairs = SlowRepairs(loop)
        members = frozenset(MEMBERS)
        asker = Rebalancer(repairs, lambda: members, every=0, spare=1, report=lambda _done: None)

        async def planned(_call: object, **_options: object) -> Plan:
            return turned_by(repairs.placement, 1)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(anyio.to_process, "run_sync", planned)
            call = asyncio.create_task(asker.rebalance())
            while not repairs.planned:
                await asyncio.sleep(0)
            members = frozenset(MEMBERS[:left])
            repairs.feed(MembersChanged(MEMBERS[:left]))
            began_s = loop.time()
            assert (await call).made == 0
            if not left:
                assert (await asker.rebalance()).planned == 0
            assert loop.time() == began_s

    run_virtually(main)


def test_a_plan_for_nobody_ends_at_once() -> None:
    machine = RepairMachine(launch_placement(RANKS, 1, 4, 4, 1), RepairConfig())
    assert machine.step(Planned((), machine.placement.slots, 1)) == [PlanEnded(0, 0, 1)]


def test_a_planner_that_is_killed_costs_a_plan_and_nothing_else() -> None:
    async def main(loop: VirtualTimeLoop) -> None:
        repairs = SlowRepairs(loop)
        asker = Rebalancer(repairs, lambda: frozenset(MEMBERS), every=10, spare=1, report=lambda _done: None)
        calls = []

        async def planned(call: object, **_options: object) -> Plan:
            calls.append(call)
            if len(calls) == 1:
                raise anyio.BrokenWorkerProcess("killed")
            return turned_by(repairs.placement, 1)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(anyio.to_process, "run_sync", planned)
            task = asyncio.create_task(asker.run())
            for step in (10, 20):
                asker.step_seen(step)
                await asyncio.sleep(0.1)
            assert len(calls) == 2
            assert repairs.planned
            assert not task.done()
            task.cancel()

    run_virtually(main)
