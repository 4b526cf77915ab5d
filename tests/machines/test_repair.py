"""Repair, rule by rule, and under hypothesis: ranks that die and return, answers that come late or wrong."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from elastic_ep.machines.contract import Tick
from elastic_ep.machines.experts import events as ev
from elastic_ep.machines.experts.repair import RepairMachine
from elastic_ep.placement import EMPTY, Placement, launch_placement
from elastic_ep.timing import RepairConfig
from elastic_ep.wire.messages import Member

SPOILT = 100


def checksum_of(layer: int, logical: int) -> int:
    return 1000 * layer + logical


@dataclass
class Rank:
    """A rank's memory, the version it routes by, and the orders that it has not carried out."""

    member: Member
    slots: list[list[int]]
    placement: Placement
    orders: deque[ev.Order] = field(default_factory=deque)
    versions: deque[Placement] = field(default_factory=deque)


class Group:
    """Ranks around a repair machine; everything they do is asked for one by one."""

    def __init__(
        self,
        ranks: int,
        experts: int,
        redundant: int,
        layers: int = 1,
        spare: int = 0,
        hosts: tuple[int, ...] = (),
    ) -> None:
        self.machine = RepairMachine(
            launch_placement(ranks, layers, experts, redundant, spare, hosts),
            RepairConfig(ranks_per_planned_copy=1),
        )
        self.ranks: dict[int, Rank] = {}
        self.ended: list[ev.PlanEnded] = []
        self.rechecked: list[Member] = []
        self.spoilt: tuple[Member, int, int] | None = None
        """The slot whose bytes are wrong: (member, layer, slot)."""
        self.incarnations = dict.fromkeys(range(ranks), 0)
        for rank in range(ranks):
            self.launch(rank)
        self.change_members()

    def launch(self, rank: int) -> None:
        self.incarnations[rank] += 1
        placement = self.machine.placement
        slots = [list(placement.on_rank(layer, rank)) for layer in range(len(placement.slots))]
        self.ranks[rank] = Rank(Member(rank, self.incarnations[rank]), slots, placement)

    def change_members(self) -> None:
        self.feed(ev.MembersChanged(tuple(sorted(rank.member for rank in self.ranks.values()))))

    def kill(self, *ranks: int) -> None:
        for rank in ranks:
            del self.ranks[rank]
        self.change_members()

    def feed(self, event: ev.Event) -> list[ev.Effect]:
        effects = self.machine.step(event)
        self.machine.check()
        for effect in effects:
            match effect:
                case ev.Order(member):
                    self.ranks[member.rank].orders.append(effect)
                case ev.Replace(changed):
                    for rank in self.ranks.values():
                        newest = rank.versions[-1] if rank.versions else rank.placement
                        rank.versions.append(newest.changed(changed.version, changed.changes))
                case ev.Recheck(member):
                    self.rechecked.append(member)
                case ev.PlanEnded():
                    self.ended.append(effect)
        return effects

    def adopt(self, number: int) -> None:
        """The rank passes a boundary."""
        rank = self.ranks[number]
        if rank.versions:
            rank.placement = rank.versions[-1]
            rank.versions.clear()
            self.feed(ev.Seen(rank.member, rank.placement.version))

    def copy(self, number: int, *, error: str = "", flip: int = 0) -> None:
        """The rank carries out its oldest order."""
        rank = self.ranks[number]
        order = rank.orders.popleft()
        for other in self.ranks.values():
            held = other.placement.slots[order.layer][order.physical]
            assert held == EMPTY, (
                f"{other.member} may still send rows for expert {held} to the slot that is overwritten"
            )
        width = self.machine.placement.slots_per_rank
        content = order.logical + SPOILT * flip
        if order.origin is not None:
            origin = self.ranks.get(order.origin.member.rank)
            if origin is None or origin.member != order.origin.member:
                error = "the source is gone"
            else:
                content = origin.slots[order.layer][order.origin.physical % width] + SPOILT * flip
        checksum = checksum_of(order.layer, content)
        if not error and order.checksum in (None, checksum):
            rank.slots[order.layer][order.physical % width] = content
        elif order.origin is None:
            rank.slots[order.layer][order.physical % width] = SPOILT  # half written
        self.feed(ev.Copied(rank.member, order.ticket, checksum, error))

    def reach(self, *numbers: int) -> None:
        """These ranks' memory can be read by others."""
        for number in numbers or self.ranks:
            self.feed(ev.Reachable(self.ranks[number].member))

    def spoil(self, layer: int, physical: int) -> None:
        """The bytes of a slot change under everybody's nose."""
        width = self.machine.placement.slots_per_rank
        rank = self.ranks[physical // width]
        rank.slots[layer][physical % width] += SPOILT
        self.spoilt = (rank.member, layer, physical % width)

    def plan(self, *layers: dict[int, set[int]]) -> None:
        """Per layer and rank what to hold."""
        width = self.machine.placement.slots_per_rank
        rows = []
        for layer, row in enumerate(self.machine.placement.slots):
            target = list(row)
            for rank, experts in layers[layer].items():
                target[rank * width : (rank + 1) * width] = [*experts, *[EMPTY] * (width - len(experts))]
            rows.append(tuple(target))
        self.feed(ev.Planned(tuple(sorted(self.machine.members)), tuple(rows)))

    def holds(self, number: int, layer: int = 0) -> set[int]:
        return set(self.machine.placement.on_rank(layer, number)) - {EMPTY}

    def sum(self, number: int, *, flip: tuple[int, int] | None = None) -> None:
        """The rank reports its checksums; `flip`: (layer, physical) whose bytes are wrong."""
        rank = self.ranks[number]
        width = self.machine.placement.slots_per_rank
        sums = []
        for layer, slots in enumerate(rank.slots):
            for slot, logical in enumerate(slots):
                place = (layer, number * width + slot)
                sums.append((*place, checksum_of(layer, logical) + (place == flip)))
        self.feed(ev.Summed(rank.member, tuple(sums)))

    def recheck(self) -> None:
        """Whoever was asked to sum its slots does."""
        for member in self.rechecked:
            rank = self.ranks.get(member.rank)
            if rank is not None and rank.member == member:
                self.sum(member.rank)
        self.rechecked.clear()

    def tick(self, ms: int) -> None:
        self.feed(Tick(self.machine.now_ms + ms))

    def settle(self) -> None:
        """Everything that is under way arrives."""
        for _ in range(1000):
            self.feed(Tick(self.machine.now_ms + 2_000))
            for number, rank in list(self.ranks.items()):
                self.adopt(number)
                while rank.orders:
                    self.copy(number)
            self.recheck()
            busy = self.machine.copies or self.machine.retry_at_ms
            if not busy and not any(rank.versions for rank in self.ranks.values()):
                return
        raise AssertionError("repair does not come to an end")

    @property
    def tolerates(self) -> int:
        return self.machine.placement.tolerates(set(self.ranks))

    @property
    def is_spread(self) -> bool:
        """Every expert is on as many hosts as the slots of those who live allow."""
        placement, ranks = self.machine.placement, set(self.ranks)
        if len(ranks) * placement.slots_per_rank < placement.num_experts:
            return True
        return all(
            min(placement.host_copies(layer, ranks)) >= self.machine.spread(layer)
            for layer in range(len(placement.slots))
        )

    def kill_host(self, host: int) -> None:
        self.kill(*[rank for rank in self.ranks if self.machine.placement.host_of(rank) == host])

    @property
    def possible(self) -> int:
        """As the slots of those who live allow, and no more than at launch."""
        placement = self.machine.placement
        room = len(self.ranks) * placement.slots_per_rank // placement.num_experts
        return min(room, min(self.machine.wanted), len(self.ranks)) - 1

    def check_memory(self) -> None:
        """What the published placement says is what lies in memory."""
        placement = self.machine.placement
        for number, rank in self.ranks.items():
            for layer, slots in enumerate(rank.slots):
                for slot, said in enumerate(placement.on_rank(layer, number)):
                    assert said in (EMPTY, slots[slot]) or self.spoilt == (rank.member, layer, slot)


def test_spare_slots_take_the_lost_copies() -> None:
    group = Group(ranks=4, experts=8, redundant=16)
    assert group.tolerates == 2
    group.kill(3)
    group.settle()
    assert group.tolerates == group.possible == 1


def test_enough_room_brings_everything_back() -> None:
    group = Group(ranks=4, experts=6, redundant=9)  # 15 copies in 16 slots, two of every expert at least
    assert group.tolerates == 1
    group.kill(0)
    group.settle()
    assert group.tolerates == 1


def test_an_expert_without_a_copy_comes_first() -> None:
    group = Group(ranks=8, experts=16, redundant=24)
    lost = group.machine.placement.on_rank(0, 0)
    partner = next(r for r in range(1, 8) if set(lost) & set(group.machine.placement.on_rank(0, r)))
    group.kill(0, partner)
    gone = [e for e, n in enumerate(group.machine.placement.copies(0, set(group.ranks))) if n == 0]
    first = [rank.orders[0].logical for rank in group.ranks.values() if rank.orders]
    group.settle()
    assert group.tolerates == group.possible
    assert not gone or set(gone) & set(first) or group.machine.placement.version > 0


def test_without_spare_slots_nothing_moves() -> None:
    group = Group(ranks=8, experts=16, redundant=16)
    group.kill(5)
    group.settle()
    assert group.machine.placement.version == 0


def test_the_returned_rank_has_its_share_at_once() -> None:
    group = Group(ranks=4, experts=8, redundant=16)
    before = group.machine.placement.on_rank(0, 3)
    group.kill(3)
    group.settle()
    group.launch(3)
    group.change_members()
    assert group.ranks[3].slots[0] == list(before)
    group.settle()
    assert group.tolerates >= 1


def test_a_slot_is_not_filled_before_everybody_has_seen_it_empty() -> None:
    group = Group(ranks=4, experts=6, redundant=10)
    group.kill(3)
    assert not any(rank.orders for rank in group.ranks.values()), (
        "all slots were full: they are emptied first"
    )
    *others, last = group.ranks
    for number in others:
        group.adopt(number)
    assert not any(rank.orders for rank in group.ranks.values())
    group.adopt(last)
    assert any(rank.orders for rank in group.ranks.values())


def test_a_failed_copy_is_tried_again_later() -> None:
    group = Group(ranks=4, experts=6, redundant=10)
    group.kill(0)
    for number in (1, 2, 3):
        group.adopt(number)
    number = next(n for n, rank in group.ranks.items() if rank.orders)
    version = group.machine.placement.version
    group.copy(number, error="disk on fire")
    assert group.machine.placement.version == version, "nothing is published for it"
    group.settle()
    assert group.tolerates == group.possible


def test_a_copy_with_wrong_bytes_is_not_published() -> None:
    group = Group(ranks=4, experts=6, redundant=10)
    for number in range(4):
        group.sum(number)
    group.kill(0)
    for number in (1, 2, 3):
        group.adopt(number)
    number = next(n for n, rank in group.ranks.items() if rank.orders)
    version = group.machine.placement.version
    group.copy(number, flip=1)
    assert group.machine.placement.version == version
    group.settle()
    assert group.tolerates == group.possible


def test_a_corrupt_slot_is_taken_out_and_made_anew() -> None:
    group = Group(ranks=4, experts=8, redundant=8)
    for number in range(4):
        group.sum(number)
    victim = (0, 5)
    group.sum(victim[1] // group.machine.placement.slots_per_rank, flip=victim)
    assert group.machine.placement.slots[0][5] == EMPTY
    group.settle()
    assert group.tolerates == 1
    group.check_memory()


def test_of_a_plan_one_slot_in_eight_ranks_is_in_flight_and_tolerance_goes_first() -> None:
    group = Group(ranks=8, experts=8, redundant=8, spare=1)
    group.machine.config = RepairConfig()
    group.reach()
    group.plan({rank: group.holds((rank + 1) % 8) for rank in range(8)})
    assert len(group.machine.copies) + len(group.machine.emptied) == 1
    for _ in range(200):
        if not group.machine.pursuit:
            break
        for number, rank in group.ranks.items():
            group.adopt(number)
            if rank.orders:
                group.copy(number)
        assert len(group.machine.copies) + len(group.machine.emptied) <= 1
        assert group.tolerates == 1
    (ended,) = group.ended
    assert ended.left == 0


def test_an_overdue_copy_is_made_elsewhere_and_its_slot_left_alone_until_it_is_reported() -> None:
    group = Group(ranks=5, experts=5, redundant=5, spare=1)
    group.kill(0)
    number = next(n for n, rank in group.ranks.items() if rank.orders)
    order = group.ranks[number].orders[0]
    for other in set(group.ranks) - {number}:
        while group.ranks[other].orders:
            group.copy(other)
    group.feed(Tick(group.machine.now_ms + 20_000))
    assert (order.layer, order.physical) in group.machine.copies
    others = [other.logical for n, rank in group.ranks.items() if n != number for other in rank.orders]
    assert order.logical in others
    group.settle()
    assert group.tolerates == group.possible


def reachable_group() -> Group:
    """Four ranks, all summed and reachable; copies of every expert on two of them, rank 0 about to be lost."""
    group = Group(ranks=4, experts=6, redundant=10)
    for number in range(4):
        group.sum(number)
    group.reach()
    return group


def first_order(group: Group) -> tuple[int, ev.Order]:
    for number in list(group.ranks):
        group.adopt(number)
    number = next(n for n, rank in group.ranks.items() if rank.orders)
    return number, group.ranks[number].orders[0]


def test_a_copy_is_pulled_from_a_living_owner() -> None:
    group = reachable_group()
    group.kill(0)
    number, order = first_order(group)
    assert order.origin is not None
    assert order.origin.member != group.ranks[number].member
    assert group.machine.placement.slots[0][order.origin.physical] == order.logical
    assert order.checksum == checksum_of(0, order.logical)


def test_pulls_spread_over_the_owners() -> None:
    group = Group(ranks=6, experts=6, redundant=12)
    for number in range(6):
        group.sum(number)
    group.reach()
    group.kill(0, 1)
    for number in list(group.ranks):
        group.adopt(number)
    origins = [order.origin.member for r in group.ranks.values() for order in r.orders if order.origin]
    assert origins
    assert max(map(origins.count, origins)) <= -(-len(origins) // len(group.ranks)) + 1


def test_without_a_checksum_only_the_checkpoint_is_trusted() -> None:
    group = Group(ranks=4, experts=6, redundant=10)
    group.reach()
    group.kill(0)
    _, order = first_order(group)
    assert order.origin is None


def test_after_a_failed_pull_comes_another_owner_and_at_last_the_checkpoint() -> None:
    group = Group(ranks=4, experts=4, redundant=8)  # three copies of every expert
    for number in range(4):
        group.sum(number)
    group.reach()
    group.sum(3, flip=(0, 3 * 3))  # one copy is found corrupt and has to be made anew
    for number in range(4):
        group.adopt(number)
    asked = []
    for _ in range(3):
        order = group.ranks[3].orders[0]
        asked.append(order.origin and order.origin.member.rank)
        group.copy(3, error="connection reset")
    first, second, last = asked
    assert {first, second} <= {0, 1, 2}
    assert first != second
    assert last is None


def test_a_source_with_wrong_bytes_is_refused_and_rechecked() -> None:
    group = reachable_group()
    group.kill(0)
    number, order = first_order(group)
    assert order.origin is not None
    group.spoil(0, order.origin.physical)
    version = group.machine.placement.version
    group.copy(number)
    assert group.machine.placement.version == version, "nothing is published for it"
    assert group.rechecked == [order.origin.member]
    group.recheck()
    assert group.machine.placement.slots[0][order.origin.physical] == EMPTY, "the corrupt slot is taken out"
    group.settle()
    assert group.tolerates == group.possible
    group.check_memory()


def test_a_source_that_dies_in_mid_transfer_is_replaced() -> None:
    group = reachable_group()
    group.kill(0)
    number, order = first_order(group)
    assert order.origin is not None
    if order.origin.member.rank != number:
        group.kill(order.origin.member.rank)
    group.copy(number)
    group.settle()
    assert group.tolerates == group.possible
    group.check_memory()


def test_a_plan_passes_through_spare_slots_and_never_costs_tolerance() -> None:
    group = Group(ranks=4, experts=4, redundant=4, spare=1)
    group.reach()
    before = [group.holds(number) for number in range(4)]
    turned = {number: before[(number + 1) % 4] for number in range(4)}
    group.plan(turned)
    for _ in range(100):
        assert group.tolerates >= 1
        for number in range(4):
            group.adopt(number)
            if group.ranks[number].orders:
                group.copy(number)
    assert [group.holds(number) for number in range(4)] == [turned[number] for number in range(4)]
    assert group.ended == [ev.PlanEnded(sum(len(turned[n] - before[n]) for n in range(4)), 0)]


def test_a_plan_that_would_cost_tolerance_ends_undone() -> None:
    group = Group(ranks=4, experts=4, redundant=4)  # no slot is spare
    before = [group.holds(number) for number in range(4)]
    group.plan({number: before[(number + 1) % 4] for number in range(4)})
    group.settle()
    assert [group.holds(number) for number in range(4)] == before
    assert group.ended[0].made == 0
    assert group.ended[0].left > 0


def test_a_loss_overtakes_a_plan() -> None:
    group = Group(ranks=4, experts=4, redundant=4, spare=1)
    before = [group.holds(number) for number in range(4)]
    group.plan({number: before[(number + 1) % 4] for number in range(4)})
    group.kill(3)
    assert len(group.ended) == 1
    assert group.machine.pursuit is None
    group.settle()
    assert group.tolerates == group.possible


def test_a_plan_for_other_members_is_refused() -> None:
    group = Group(ranks=4, experts=4, redundant=4, spare=1)
    rows = group.machine.placement.slots
    group.feed(ev.Planned((Member(0, 1), Member(1, 1)), rows))
    assert group.machine.pursuit is None
    assert group.ended == [ev.PlanEnded(0, 0)]


HOSTS = (0, 0, 1, 1, 2, 2)


def test_what_a_lost_host_held_is_made_again_on_two_hosts() -> None:
    group = Group(ranks=6, experts=6, redundant=12, hosts=HOSTS)
    assert group.machine.placement.tolerates_hosts(set(group.ranks)) == 2
    group.kill_host(1)
    group.settle()
    assert group.machine.placement.tolerates_hosts(set(group.ranks)) == 1
    assert group.tolerates == group.possible == 1


def test_copies_that_share_a_host_part_when_another_host_is_back() -> None:
    """Two of three hosts are lost, so what is made again lies on one; every slot is needed when they are back."""
    group = Group(ranks=6, experts=9, redundant=9, hosts=HOSTS)
    group.kill_host(0)
    group.kill(2)
    group.settle()
    for rank in (0, 1, 2):
        group.launch(rank)
        group.change_members()
    group.settle()
    assert group.is_spread
    assert group.machine.placement.tolerates_hosts(set(group.ranks)) == 1
    group.check_memory()


def test_an_expert_on_one_host_goes_to_another_though_every_slot_is_needed() -> None:
    """Both experts 0 and 1 have two copies on their own host alone, and there is not one slot to spare."""
    group = Group(ranks=4, experts=2, redundant=2, hosts=(0, 0, 1, 1))
    placement = replace(group.machine.placement, slots=((0, 0, 1, 1),))
    group.machine.placement = placement
    for rank, held in enumerate(placement.slots[0]):
        group.ranks[rank].placement, group.ranks[rank].slots = placement, [[held]]
    assert placement.tolerates_hosts(range(4)) == 0
    group.feed(ev.MembersChanged(tuple(sorted(rank.member for rank in group.ranks.values()))))
    group.settle()
    assert group.machine.placement.tolerates_hosts(range(4)) == 1
    assert group.tolerates == 1


class Repairs(RuleBasedStateMachine):
    """Any order of deaths, returns, boundaries, copies, errors and wrong bytes, on one host or several."""

    @initialize(
        ranks=st.integers(2, 5),
        experts=st.integers(2, 6),
        redundant=st.integers(0, 12),
        spare=st.integers(0, 1),
        hosts=st.sampled_from([(), (0, 0, 1, 1, 2), (0, 1, 2, 0, 1), (0, 1, 1, 1, 0)]),
    )
    def begin(self, ranks: int, experts: int, redundant: int, spare: int, hosts: tuple[int, ...]) -> None:
        self.total = ranks
        self.group = Group(ranks, experts, redundant, layers=2, spare=spare, hosts=hosts[:ranks])
        for number in range(ranks):
            self.group.sum(number)

    def some(self, data: st.DataObject, numbers: list[int]) -> int | None:
        return data.draw(st.sampled_from(numbers)) if numbers else None

    @rule(data=st.data())
    def kill(self, data: st.DataObject) -> None:
        number = self.some(data, sorted(self.group.ranks))
        if number is not None and len(self.group.ranks) > 1:
            self.group.kill(number)

    @rule(host=st.integers(0, 2))
    def lose_host(self, host: int) -> None:
        placement = self.group.machine.placement
        if len(there := placement.by_host(self.group.ranks)) > 1 and host in there:
            self.group.kill_host(host)

    @precondition(lambda self: len(self.group.ranks) < self.total)
    @rule(data=st.data())
    def come_back(self, data: st.DataObject) -> None:
        number = self.some(data, [n for n in range(self.total) if n not in self.group.ranks])
        assert number is not None
        self.group.launch(number)
        self.group.change_members()

    @rule(data=st.data())
    def pass_a_boundary(self, data: st.DataObject) -> None:
        number = self.some(data, sorted(self.group.ranks))
        if number is not None:
            self.group.adopt(number)

    @rule(
        data=st.data(), error=st.sampled_from(["", "", "", "cannot read"]), flip=st.sampled_from([0, 0, 0, 1])
    )
    def copy(self, data: st.DataObject, error: str, flip: int) -> None:
        number = self.some(data, [n for n, rank in sorted(self.group.ranks.items()) if rank.orders])
        if number is not None:
            self.group.copy(number, error=error, flip=flip)

    @rule(data=st.data())
    def become_reachable(self, data: st.DataObject) -> None:
        number = self.some(data, sorted(self.group.ranks))
        if number is not None:
            self.group.reach(number)

    @rule(data=st.data())
    def answer_recheck(self, data: st.DataObject) -> None:
        self.group.recheck()

    @rule(data=st.data())
    def plan(self, data: st.DataObject) -> None:
        """Any placement at all may be asked for, sensible or not."""
        placement = self.group.machine.placement
        experts = st.sets(st.integers(0, placement.num_experts - 1), max_size=placement.slots_per_rank)
        held, on_hosts = self.group.tolerates, placement.tolerates_hosts(self.group.ranks)
        self.group.plan(*[{n: data.draw(experts) for n in self.group.ranks} for _ in placement.slots])
        after = self.group.machine.placement
        parting = len(set(placement.hosts)) > 1  # one copy may be given up, so that two do not share a host
        assert self.group.tolerates >= min(held, self.group.possible) - parting, "a plan costs tolerance"
        needed = min(self.group.machine.spread(layer) for layer in range(len(placement.slots))) - 1
        assert after.tolerates_hosts(self.group.ranks) >= min(on_hosts, needed), "a plan costs a host"

    @rule(ms=st.integers(1, 15_000))
    def time_passes(self, ms: int) -> None:
        self.group.feed(Tick(self.group.machine.now_ms + ms))

    @invariant()
    def memory_is_as_published(self) -> None:
        if hasattr(self, "group"):
            self.group.check_memory()

    def teardown(self) -> None:
        if hasattr(self, "group"):
            self.group.settle()
            assert self.group.tolerates >= self.group.possible, "tolerance did not come back"
            assert self.group.is_spread, "copies stay on one host that could be on more"


TestRepairs = Repairs.TestCase
TestRepairs.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
pytestmark = pytest.mark.timeout(120)
