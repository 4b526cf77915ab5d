"""Placement: what the first one guarantees, and what its readings say."""

from __future__ import annotations

import random
from itertools import combinations, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_ep.placement import EMPTY, Change, CopyCounts, Coverage, Placement, grown, launch_placement

SIZES = [
    (8, 0),
    (8, 8),
    (8, 3),
    (8, 16),
    (32, 32),
    (60, 60),
    (60, 4),
    (64, 64),
    (128, 128),
    (128, 32),
    (128, 256),
]


def hands(placement: Placement, layer: int = 0) -> list[list[int]]:
    """What each rank holds, without its empty slots."""
    ranks = range(placement.num_ranks)
    return [[e for e in placement.on_rank(layer, rank) if e != EMPTY] for rank in ranks]


@pytest.mark.parametrize("num_ranks", range(1, 65))
def test_launch_placement(num_ranks: int) -> None:
    for experts, redundant in SIZES:
        total = experts + redundant
        placement = launch_placement(num_ranks, 2, experts, redundant)
        assert placement.slots_per_rank == -(-total // num_ranks)
        assert [len(row) for row in placement.slots] == [num_ranks * placement.slots_per_rank] * 2
        held = hands(placement)
        assert all(len(hand) == len(set(hand)) for hand in held), "two copies of an expert on one rank"
        counts = [sum(expert in hand for hand in held) for expert in range(experts)]
        wanted = [total // experts + (expert < total % experts) for expert in range(experts)]
        assert counts == [min(num_ranks, copies) for copies in wanted], (experts, redundant)
        assert max(map(len, held)) - min(map(len, held)) <= 1
        everyone = range(num_ranks)
        assert Coverage.of(placement).by(everyone)
        assert placement.tolerates(everyone) == min(num_ranks, total // experts) - 1


@pytest.mark.parametrize("num_ranks", range(2, 65))
def test_as_many_redundant_experts_as_experts_survive_any_one_loss(num_ranks: int) -> None:
    for experts in (8, 32, 60, 64, 128):
        placement = launch_placement(num_ranks, 1, experts, experts)
        assert placement.tolerates(range(num_ranks)) >= 1
        for lost in range(num_ranks):
            assert Coverage.of(placement).by(rank for rank in range(num_ranks) if rank != lost)


@pytest.mark.parametrize("num_ranks", range(3, 17))
def test_a_lost_rank_is_covered_by_many_others(num_ranks: int) -> None:
    held = hands(launch_placement(num_ranks, 1, 128, 128))
    for hand in held:
        helpers = [other for other in held if other is not hand and set(other) & set(hand)]
        assert len(helpers) >= min(num_ranks - 1, len(hand)) / 2


@st.composite
def hosts_of_a_group(draw: st.DrawFn) -> tuple[int, ...]:
    """Of each rank, in any order; as many ranks on each."""
    hosts, each = draw(st.integers(2, 5)), draw(st.integers(1, 4))
    return tuple(draw(st.permutations([host for host in range(hosts) for _ in range(each)])))


@given(hosts_of_a_group(), st.integers(1, 20), st.integers(0, 60), st.integers(0, 1))
def test_launch_placement_keeps_copies_on_different_hosts(
    hosts: tuple[int, ...], experts: int, redundant: int, spare: int
) -> None:
    ranks, total = range(len(hosts)), experts + redundant
    placement = launch_placement(len(hosts), 1, experts, redundant, spare, hosts)
    plain = launch_placement(len(hosts), 1, experts, redundant, spare)
    held = hands(placement)
    assert all(len(hand) == len(set(hand)) for hand in held), "two copies of an expert on one rank"
    assert placement.copies(0, ranks) == plain.copies(0, ranks)
    assert placement.slots_per_rank == plain.slots_per_rank
    everywhere = min(len(set(hosts)), total // experts)
    assert placement.tolerates_hosts(ranks) == everywhere - 1, "slots allow so many hosts"
    for lost in set(hosts):
        assert Coverage.of(placement).by(rank for rank in ranks if hosts[rank] != lost) or everywhere == 1


@given(st.integers(1, 16), st.integers(1, 20), st.integers(0, 60), st.integers(0, 1))
def test_with_one_host_the_launch_is_as_without(ranks: int, experts: int, redundant: int, spare: int) -> None:
    named = launch_placement(ranks, 2, experts, redundant, spare, (7,) * ranks)
    assert named.slots == launch_placement(ranks, 2, experts, redundant, spare).slots
    assert named.tolerates_hosts(range(ranks)) == 0


def test_what_a_lost_host_held_is_spread_over_all_others() -> None:
    hosts = tuple(rank // 4 for rank in range(16))
    placement = launch_placement(16, 1, 128, 128, hosts=hosts)
    held = hands(placement)
    for lost in range(4):
        gone = {expert for rank in range(16) if hosts[rank] == lost for expert in held[rank]}
        heirs = [len(gone & set(held[rank])) for rank in range(16) if hosts[rank] != lost]
        assert max(heirs) - min(heirs) <= 4, "an even share would be 64 / 12"


@pytest.mark.parametrize(
    ("hosts", "experts", "redundant", "tolerates"),
    [
        ((0, 0, 0, 1, 1), 4, 4, 1),  # the second host's ranks have more than an even share
        ((0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2), 9, 18, 2),
        ((0, 0, 0, 0, 1), 8, 8, 0),  # rank 4 cannot hold a copy of each
    ],
)
def test_hosts_of_unequal_size_have_as_much_as_their_slots_allow(
    hosts: tuple[int, ...], experts: int, redundant: int, tolerates: int
) -> None:
    placement = launch_placement(len(hosts), 1, experts, redundant, hosts=hosts)
    assert placement.tolerates_hosts(range(len(hosts))) == tolerates
    assert placement.spread(range(len(hosts)), (experts + redundant) // experts) == tolerates + 1


@pytest.mark.parametrize(("experts", "spare"), [(8, 0), (8, 1), (12, 0), (60, 1)])
def test_whoever_a_group_grows_by_has_further_copies_spread_over_its_host(experts: int, spare: int) -> None:
    hosts = (0, 0, 1, 1, 2, 2, 3, 3)
    first = launch_placement(4, 2, experts, experts, num_spare=spare, hosts=hosts[:4])
    grown_by_two = grown(first, hosts, num_spare=spare)
    assert (grown_by_two.num_ranks, grown_by_two.hosts) == (8, hosts)
    for layer, row in enumerate(grown_by_two.slots):
        assert row[: len(first.slots[layer])] == first.slots[layer]
        for rank in range(8):
            held = [expert for expert in grown_by_two.on_rank(layer, rank) if expert != EMPTY]
            assert len(held) == len(set(held)) == min(first.slots_per_rank - spare, experts)
        for there in ((4, 5), (6, 7)):
            assert set(grown_by_two.copies(layer, there)) == {1}, "each new host has one copy of everything"
    assert grown_by_two.tolerates_hosts(range(6)) == first.tolerates_hosts(range(4)) + 1
    assert grown(first, hosts[:4], num_spare=spare) == first


def test_hosts_of_other_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="hosts of 3 ranks"):
        launch_placement(4, 1, 4, 4, hosts=(0, 0, 1))


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    num_ranks, slots_per_rank = draw(st.integers(1, 5)), draw(st.integers(1, 3))
    experts = draw(st.integers(1, 4))
    size = num_ranks * slots_per_rank
    row = st.lists(st.integers(EMPTY, experts - 1), min_size=size, max_size=size).map(tuple)
    rows = draw(st.lists(row, min_size=1, max_size=2))
    hosts = tuple(draw(st.lists(st.integers(0, 2), min_size=num_ranks, max_size=num_ranks)))
    return Placement(0, num_ranks, slots_per_rank, experts, tuple(rows), draw(st.sampled_from([(), hosts])))


def brute_force(placement: Placement, units: list[list[int]]) -> int:
    """The largest number of losses, whichever they are, after which every expert is still held; -1: not even now.

    `units` of ranks that are lost together.
    """
    for lost in range(len(units) + 1):
        for gone in combinations(units, lost):
            left = {rank for unit in units if unit not in gone for rank in unit}
            for layer in range(len(placement.slots)):
                held = {expert for rank in left for expert in placement.on_rank(layer, rank)}
                if not set(range(placement.num_experts)) <= held:
                    return lost - 1
    raise AssertionError("nobody is left and every expert is held")


@given(placements(), st.data())
def test_tolerates_is_what_brute_force_says(placement: Placement, data: st.DataObject) -> None:
    ranks = sorted(data.draw(st.sets(st.integers(0, placement.num_ranks - 1))))
    assert placement.tolerates(ranks) == brute_force(placement, [[rank] for rank in ranks])
    hosts = list(placement.by_host(ranks).values())
    assert placement.tolerates_hosts(ranks) == brute_force(placement, hosts)
    assert Coverage.of(placement).by(ranks) == (placement.tolerates(ranks) >= 0)


@given(placements(), st.data())
def test_coverage_follows_changes(placement: Placement, data: st.DataObject) -> None:
    layers, width = len(placement.slots), placement.num_ranks * placement.slots_per_rank
    change = st.builds(
        Change,
        st.integers(0, layers - 1),
        st.integers(0, width - 1),
        st.integers(EMPTY, placement.num_experts - 1),
    )
    changes = data.draw(st.lists(change, max_size=6))
    changed = placement.changed(1, changes)
    assert Coverage.of(placement).after(changes, changed) == Coverage.of(changed)
    rows = [list(row) for row in placement.slots]
    for layer, physical, logical in changes:
        rows[layer][physical] = logical
    assert changed.slots == tuple(map(tuple, rows))


@pytest.mark.parametrize("hosts", [(), (0, 0, 1, 1, 2, 2), (0, 1, 2, 3, 4, 5), (0, 0, 0, 1, 1, 2)])
def test_counts_that_follow_members_and_changes_are_those_of_the_placement(hosts: tuple[int, ...]) -> None:
    dice = random.Random(len(hosts) + sum(hosts))
    for experts in (4, 6, 9):
        placement = launch_placement(6, 3, experts, dice.choice([3, experts, 2 * experts]), 1, hosts)
        counts = CopyCounts(placement)
        counts.of(frozenset(range(6)))
        for _ in range(30):
            if dice.random() < 0.5:
                counts.of(frozenset(dice.sample(range(6), dice.randint(1, 6))))
            else:
                layer, physical = dice.randrange(3), dice.randrange(6 * placement.slots_per_rank)
                held = placement.on_rank(layer, placement.rank_of(physical))
                fitting = [expert for expert in range(experts) if expert not in held]
                change = Change(layer, physical, dice.choice([EMPTY, *fitting]))
                placement = placement.changed(placement.version + 1, [change])
                counts.change(change, placement)
            copies = [min(placement.copies(layer, counts.ranks)) for layer in range(3)]
            on_hosts = [min(placement.host_copies(layer, counts.ranks)) for layer in range(3)]
            assert counts.least() == (min(copies), min(on_hosts))
            for layer, least, most in product(range(3), range(1, 8), range(1, 4)):
                lacks = copies[layer] < least or (most > 1 and on_hosts[layer] < most)
                assert bool(counts.lacking(layer, least, most)) == lacks
                assert counts.spread(least) == placement.spread(list(counts.ranks), least)
