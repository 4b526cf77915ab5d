"""The controller around real machines: deadlines, lost messages, ranks that break the protocol, causes of death."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_ep.machines.experts import events as repair
from elastic_ep.machines.membership import events as ev
from elastic_ep.machines.membership.events import GroupState
from elastic_ep.machines.requests import events as routing
from elastic_ep.wire.host_messages import Died
from elastic_ep.wire.messages import (
    Member,
    Numbered,
    Promise,
    RankReport,
    RankState,
    SamplingParams,
    StepReport,
)
from elastic_ep.wire.slot_messages import CopySlot, ExpertLoads, PlacementSeen, SlotCopied, SlotSum, SlotSums
from tests.kit.fake_group import SPOILT, FakeGroup, FakeRank
from tests.kit.virtual_time import VirtualTimeLoop, run_virtually

BOUND_S = 0.01
"""A deadline is met so late at most."""


def simulate(
    main: Callable[[FakeGroup], Coroutine[Any, Any, None]],
    *,
    arrange: Callable[[FakeGroup], None] = lambda _group: None,
    **shape: Any,
) -> FakeGroup:
    """A group in which nothing happens but what `main` makes happen: no beats, no pulses, no steps."""

    async def run(loop: VirtualTimeLoop) -> FakeGroup:
        group = FakeGroup(loop, **shape)
        loop.on_sleep(lambda until_s: assert_no_deadline_is_slept_through(group, until_s))
        arrange(group)
        group.launch()
        await group.until(lambda: group.all_serve, "all ranks serve")
        await main(group)
        return group

    return run_virtually(run)


def assert_no_deadline_is_slept_through(group: FakeGroup, until_s: float | None) -> None:
    for machine in (group.controller.machine, group.controller.repairs.machine, group.router.machine):
        due_ms = machine.next_deadline_ms()
        if due_ms is not None:
            name = type(machine).__name__
            assert until_s is not None, f"{name} waits for {due_ms} ms, and nobody will wake it"
            assert until_s <= due_ms / 1000 + BOUND_S, f"{name} has a deadline that is slept through"


# A loss


@pytest.mark.parametrize("lost", range(3))
def test_what_a_lost_rank_had_is_given_out_before_anything_else_is_decided(lost: int) -> None:
    async def main(group: FakeGroup) -> None:
        group.log.recorded.clear()
        group.kill(lost)

    heard = [(machine, type(event)) for machine, event, _ in simulate(main).log.recorded]
    given_out = heard.index(("routing", routing.RankDown))
    assert ("repair", repair.MembersChanged) in heard
    assert {machine for machine, _ in heard[:given_out]} == {"membership"}


# Deadlines


def whims(group: FakeGroup, choose: random.Random) -> Callable[[FakeRank, CopySlot], None]:
    """A rank carries an order out, now or later, or fails, has wrong bytes, or says nothing any more."""

    def ordered(rank: FakeRank, order: CopySlot) -> None:
        match choose.randrange(6):
            case 0:
                rank.copy(order, error="cannot read")
            case 1:
                rank.copy(order, spoil=1)
            case 2:
                group.loop.call_later(choose.uniform(0, 30), rank.copy, order)
            case 3:
                pass
            case _:
                rank.copy(order)

    return ordered


class Orders:
    """One at a time for each slot of a rank, and after a source of last resort has failed not before a while."""

    def __init__(self, group: FakeGroup) -> None:
        self._group = group
        self.carry_out = group.ordered
        self._open: dict[tuple[Member, int, int], CopySlot] = {}
        self._not_before: dict[tuple[Member, int, int], float] = {}
        group.ordered = self.ordered
        group.copied = self.copied

    def ordered(self, rank: FakeRank, order: CopySlot) -> None:
        place = (rank.member, order.layer, order.physical)
        assert place not in self._open, "a slot is ordered twice at once"
        assert self._group.loop.time() >= self._not_before.get(place, 0.0) - BOUND_S, "it is tried at once"
        self._open[place] = order
        self.carry_out(rank, order)

    def copied(self, rank: FakeRank, order: CopySlot, done: SlotCopied) -> None:
        place = (rank.member, order.layer, order.physical)
        del self._open[place]
        wrong = order.checksum not in (None, done.checksum)
        if order.origin is None and (done.error or wrong):
            retry_s = self._group.controller.repairs.machine.config.retry_ms / 1000
            self._not_before[place] = self._group.loop.time() + retry_s


def one_thing(group: FakeGroup, choose: random.Random) -> None:
    controller = group.controller
    rank = choose.choice(list(group.ranks.values()))
    match choose.randrange(8):
        case 0:
            group.kill(rank.member.rank)
        case 1:
            work: list[ev.Event] = [ev.WorkBegan(), ev.WorkEnded()]
            controller.feed(choose.choice(work))
        case 2:
            place = choose.choice(list(rank.contents))
            rank.contents[place] += 1
            controller.repairs.audit.ask(controller.machine.view.members)
        case 3:
            placement = controller.repairs.placement
            members = tuple(sorted(controller.machine.view.members))
            turned = tuple(
                row[placement.slots_per_rank :] + row[: placement.slots_per_rank] for row in placement.slots
            )
            controller.repairs.feed(repair.Planned(members, turned))
        case 4:
            rank.silent = True
        case 6:
            group.router.submit((1, 2), SamplingParams(9), 0, 0)
        case 5:
            rank.say(RankReport(RankState.FAILED, "broken"))
        case _:
            rank.say(Promise(controller.machine.attempts, 7))


@pytest.mark.parametrize("seed", range(60))
def test_no_deadline_is_slept_through_and_all_comes_back(seed: int) -> None:
    """Whatever happens to a group without traffic: time alone brings back every rank and every copy."""
    choose = random.Random(seed)

    async def main(group: FakeGroup) -> None:
        group.ordered = whims(group, choose)
        orders = Orders(group)
        for _ in range(choose.randrange(1, 8)):
            one_thing(group, choose)
            await asyncio.sleep(choose.choice([0.0, 0.01, 0.4, 5.0, 40.0]))
        orders.carry_out = lambda rank, order: rank.copy(order)
        for rank in list(group.ranks.values()):
            if rank.silent:  # as the watch over progress would find out
                group.controller.feed(ev.Suspected(rank.member, "hangs"))
        await group.until(lambda: quiet(group), "everything comes back", 200.0)

    def quiet(group: FakeGroup) -> bool:
        controller, machine = group.controller, group.controller.repairs.machine
        awaited = any(not copy.overdue for copy in machine.copies.values())
        busy = awaited or machine.retry_at_ms or machine.emptied or machine.pursuit
        return group.all_serve and not busy and controller.machine.tolerates >= 1

    simulate(main, ranks=3, experts=4, redundant=4, spare=1, relaunch_limit=1000)


Outcome = Callable[[FakeRank, CopySlot], None]
FAILURES: dict[str, tuple[Outcome, int, int]] = {
    "cannot be read once": (lambda rank, order: rank.copy(order, error="cannot read"), 1, 1),
    "cannot be read often": (lambda rank, order: rank.copy(order, error="cannot read"), 12, 1),
    "is wrong once": (lambda rank, order: rank.copy(order, spoil=1), 1, 1),
    "is wrong often": (lambda rank, order: rank.copy(order, spoil=1), 12, 1),
    "is never reported": (lambda rank, order: None, 1, 3),
}
"""How a copy fails, and how often at each expert, and the slots of a rank that are free."""


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize(("outcome", "times", "spare"), FAILURES.values(), ids=FAILURES.keys())
def test_a_copy_that_fails_is_made_all_the_same_though_nothing_else_happens(
    outcome: Outcome, times: int, spare: int, layers: int
) -> None:
    """Each expert's copy fails so many times. Nobody is lost or comes back meanwhile, and no step is made."""

    async def main(group: FakeGroup) -> None:
        tries: Counter[tuple[int, int]] = Counter()
        made: Outcome = group.ordered

        def ordered(rank: FakeRank, order: CopySlot) -> None:
            tries[order.layer, order.logical] += 1
            last = tries[order.layer, order.logical] > times
            (made if last else outcome)(rank, order)

        group.ordered = ordered
        Orders(group)
        group.kill(3)
        await group.until(lambda: group.controller.machine.tolerates == 1, "the copies are made", 300.0)
        assert max(tries.values()) == times + 1
        assert not group.wrong()

    simulate(main, ranks=4, experts=3, redundant=3, spare=spare, layers=layers, relaunch_limit=0)


@pytest.mark.parametrize("work", [True, False])
def test_an_idle_group_parks_and_a_busy_one_does_not(work: bool) -> None:
    async def main(group: FakeGroup) -> None:
        group.controller.feed(ev.WorkBegan() if work else ev.WorkEnded())
        await asyncio.sleep(2.0)
        assert (group.controller.machine.group_state is GroupState.PAUSED) is not work

    simulate(main)


# Lost messages


class Losing:
    """Loses the message number `index` of those to rank 1's second incarnation."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.seen = 0
        self.lost: Any = None

    def __call__(self, rank: FakeRank, message: Any) -> bool:
        if rank.member != Member(1, 2):
            return False
        self.seen += 1
        if self.seen - 1 == self.index:
            self.lost = message
            return True
        return False


@pytest.mark.parametrize("work", [True, False], ids=["busy", "idle"])
def test_a_joiner_that_loses_any_one_message_joins_all_the_same(work: bool) -> None:
    """In the incarnation that it is, in the attempt that it is asked to join."""
    kinds = set()
    for index in range(100):
        losing = Losing(index)

        async def main(group: FakeGroup, losing: Losing = losing) -> None:
            group.loses = losing
            if work:
                group.controller.feed(ev.WorkBegan())
            beats = asyncio.create_task(group.controller.beat())
            group.kill(1)
            await group.until(lambda: group.all_serve, f"it joins without {losing.lost}", 5.0)
            assert group.ranks[1].member == Member(1, 2), f"lost in vain: {losing.lost}"
            assert not group.processes.fenced
            await asyncio.sleep(3.0)
            assert group.all_serve
            assert group.ranks[1].machine.view == group.controller.machine.view
            beats.cancel()

        simulate(main)
        if losing.lost is None:
            break
        body = losing.lost.body if isinstance(losing.lost, Numbered) else losing.lost
        kinds.add(type(body).__name__)
    else:
        raise AssertionError("a joiner hears more than a hundred messages")
    assert {"Beat", "Snapshot", "Prepare", "Commit"} <= kinds


# Ranks that break the protocol

MEMBERS = st.sampled_from([Member(0, 1), Member(0, 2), Member(1, 1), Member(2, 1), Member(7, 1)])
NUMBERS = st.sampled_from([-1, 0, 1, 2, 3, 7, 1 << 40])


ROWS = st.lists(st.lists(NUMBERS, max_size=4), max_size=2)
SUMS = st.lists(st.builds(SlotSum, NUMBERS, NUMBERS, NUMBERS), max_size=3)
SPOKEN = st.one_of(
    st.builds(lambda state: RankReport(state, "so it says"), st.sampled_from(RankState)),
    st.builds(Promise, NUMBERS, NUMBERS),
    st.builds(PlacementSeen, NUMBERS),
    st.builds(SlotCopied, NUMBERS, NUMBERS),
    st.builds(lambda rows: ExpertLoads(tuple(map(tuple, rows))), ROWS),
    st.builds(lambda ticket, sums: SlotSums(ticket, tuple(sums)), NUMBERS, SUMS),
    st.builds(
        lambda step, epoch, masked: StepReport(step, epoch, 0, 1, (), 0, 0, 0, 0, masked=tuple(masked)),
        NUMBERS, NUMBERS, st.lists(NUMBERS, max_size=2),
    ),
)  # fmt: skip
"""What a rank may say without regard to what it was asked."""


@given(said=st.lists(st.tuples(MEMBERS, SPOKEN), max_size=12))
@settings(max_examples=60, deadline=None)
def test_a_rank_that_breaks_the_protocol_costs_nobody_but_itself(said: list[tuple[Member, Any]]) -> None:
    """Nothing that a rank says makes the controller raise, and the group comes back."""

    async def main(group: FakeGroup) -> None:
        for member, message in said:
            group.controller.on_message(member, message)
            await asyncio.sleep(0.05)
        speakers = {member.rank for member, _ in said}
        accused = {rank for _, m in said if isinstance(m, StepReport) for rank in m.masked}
        assert {member.rank for member in group.processes.fenced} <= speakers | accused
        await group.until(lambda: group.all_serve, "all serve again")
        placement = group.controller.repairs.placement
        for layer in range(len(placement.slots)):
            group.controller.repairs.loads.of_layer(layer, placement.num_experts)

    simulate(main, relaunch_limit=1000)


@pytest.mark.parametrize("state", [RankState.INIT_CUDA, RankState.INIT_DIST, RankState.JOINING])
def test_a_serving_rank_that_says_it_starts_is_fenced_as_a_protocol_error(state: RankState) -> None:
    async def main(group: FakeGroup) -> None:
        group.controller.on_message(Member(1, 1), RankReport(state))
        await group.until(lambda: group.all_serve and group.ranks[1].member == Member(1, 2), "it is back")
        assert group.processes.fenced == [Member(1, 1)]
        (down,) = group.log.effects(ev.MemberDown)
        assert down.reason.startswith("protocol error"), down

    simulate(main)


# Causes of death


@pytest.mark.parametrize("seed", range(30))
def test_the_logs_cause_of_a_death_is_the_first_notices(seed: int) -> None:
    """Other notices, masked steps of the survivors and the exit status come after it in any order."""
    choose = random.Random(seed)

    async def main(group: FakeGroup) -> None:
        controller = group.controller
        victim = Member(1, 1)
        epoch = controller.machine.view.epoch
        causes = choose.sample(["mutex", "pidfd", "reaped"], 3)
        notices: list[Callable[[], None]] = [
            lambda cause=cause, at=at: controller.on_death(victim, cause, at)  # type: ignore[misc]  # bound now
            for at, cause in enumerate(causes)
        ]
        masked = StepReport(5, epoch, 0, 1, (), 0, 0, 0, 0, masked=(1,), mask_ns=1)

        def survivor_tells() -> None:
            controller.on_message(Member(0, 1), masked)

        later = [*notices[1:], survivor_tells]
        choose.shuffle(later)
        group.ranks[1].alive = False
        notices[0]()
        for act in later:
            await asyncio.sleep(choose.choice([0, 0.001]))
            act()
        controller.on_gone(victim, "SIGKILL")
        noted = [facts for kind, facts in group.log.notes if kind == "death_notice"]
        assert [(facts["source"], facts["at_ns"]) for facts in noted] == [(causes[0], 0)]
        (down,) = group.log.effects(ev.MemberDown)
        assert down.reason == "died"
        assert not group.processes.fenced
        await group.until(lambda: group.all_serve, "it is back")

    simulate(main)


def test_a_death_that_the_agent_has_told_is_heard_before_a_survivor_is_believed() -> None:
    """Its masked step may be read first; it must not make a hang of a death."""

    async def main(group: FakeGroup) -> None:
        controller, victim = group.controller, Member(1, 1)
        group.processes.unheard.append(lambda: controller.on_process(Died(victim, "mutex", 0)))
        epoch = controller.machine.view.epoch
        group.ranks[1].alive = False
        controller.on_message(
            Member(0, 1), StepReport(5, epoch, 0, 1, (), 0, 0, 0, 0, masked=(1,), mask_ns=1)
        )
        controller.on_gone(victim, "SIGKILL")
        (down,) = group.log.effects(ev.MemberDown)
        assert down.reason == "died"
        assert not group.processes.fenced
        await group.until(lambda: group.all_serve, "it is back")

    simulate(main)


# Wrong bytes


def test_wrong_bytes_in_a_joiner_are_found_and_mended_though_nobody_asks() -> None:
    async def main(group: FakeGroup) -> None:
        begin = group.begin

        def begin_spoilt(member: Member) -> None:
            begin(member)
            place = min(group.ranks[member.rank].contents)
            group.ranks[member.rank].contents[place] += SPOILT

        group.processes.group.begin = begin_spoilt  # type: ignore[method-assign]
        group.kill(1)
        await group.until(lambda: group.all_serve, "it is back")
        await group.until(lambda: not group.wrong(), "the bytes are right", 10.0)
        await group.until(lambda: group.controller.machine.tolerates >= 1, "the copy counts again", 10.0)
        assert len(group.log.effects(repair.Corrupt)) == 1

    simulate(main, spare=1)


def test_a_source_whose_bytes_are_wrong_is_found_out_and_mended() -> None:
    """Whatever copy is wrong when a rank is lost for good: nothing made of it counts, and if it was read it is mended."""
    read = []
    for number in (0, 1, 2, 3):
        for spoilt in range(4):

            async def main(group: FakeGroup, number: int = number, spoilt: int = spoilt) -> None:
                sources: list[tuple[int, int]] = []

                def ordered(rank: FakeRank, order: CopySlot) -> None:
                    if order.origin is not None:
                        sources.append((order.layer, order.origin))
                    rank.copy(order)

                group.ordered = ordered
                victim = group.ranks[spoilt]
                places = [place for place, held in victim.contents.items() if held >= 0]
                place = places[number % len(places)]
                victim.contents[place] += SPOILT
                group.kill((spoilt + 1) % 4)
                await asyncio.sleep(30.0)
                if place in sources:
                    read.append(place)
                    assert not group.wrong(), "it was read, and is wrong still"
                assert group.wrong() <= {place}, "wrong bytes were copied"
                assert group.controller.machine.tolerates >= 1

            simulate(main, ranks=4, experts=4, redundant=4, spare=1, relaunch_limit=0)
    assert len(read) > 2
