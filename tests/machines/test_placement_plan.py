"""The planner: tolerance, balance, few moves; under hypothesis for any number of ranks, experts and loads."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_ep.machines.experts.balance import Board, Edit
from elastic_ep.machines.experts.packing import packed, seat_again
from elastic_ep.machines.experts.planner import PlanInput, plan
from elastic_ep.placement import EMPTY, Placement, launch_placement, most_hosts
from tests.kit.plain_routing import rank_loads

FIRST_EXAMPLE = (90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86)
SECOND_EXAMPLE = (20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27)
"""The loads of DeepSeek's published example (EPLB, 2025): 12 experts, 16 copies, 8 GPUs."""


def planned(given: PlanInput) -> Placement:
    found = plan(given)
    placement = given.placement
    return replace(placement, version=1, slots=found.slots)


@st.composite
def inputs(draw: st.DrawFn) -> PlanInput:
    ranks = draw(st.integers(1, 9))
    experts = draw(st.integers(1, 12))
    redundant = draw(st.integers(0, 2 * experts))
    spare = draw(st.integers(0, 1))
    layers = draw(st.integers(1, 2))
    hosts = draw(st.lists(st.integers(0, 2), min_size=ranks, max_size=ranks))
    hosts = draw(st.sampled_from([[], hosts]))
    placement = launch_placement(ranks, layers, experts, redundant, spare, hosts)
    living = draw(st.sets(st.integers(0, ranks - 1), min_size=1))
    loads = draw(
        st.lists(
            st.lists(st.integers(0, 1000).map(float), min_size=experts, max_size=experts),
            min_size=layers,
            max_size=layers,
        )
    )
    return PlanInput(placement, tuple(sorted(living)), loads, spare)


def held(placement: Placement, layer: int, rank: int) -> list[int]:
    return [expert for expert in placement.on_rank(layer, rank) if expert != EMPTY]


@settings(deadline=None)
@given(inputs())
def test_every_expert_has_as_many_copies_and_hosts_as_slots_allow_and_no_two_on_a_rank(
    given: PlanInput,
) -> None:
    after = planned(given)
    room = len(given.ranks) * (after.slots_per_rank - given.spare)
    floor = min(len(given.ranks), room // after.num_experts)
    for layer in range(len(after.slots)):
        for rank in given.ranks:
            experts = held(after, layer, rank)
            assert len(experts) == len(set(experts))
            assert len(experts) <= after.slots_per_rank - given.spare
        assert min(after.copies(layer, given.ranks)) >= floor
        rooms = [
            len(there) * (after.slots_per_rank - given.spare) for there in after.by_host(given.ranks).values()
        ]
        if floor:
            assert min(after.host_copies(layer, given.ranks)) >= most_hosts(rooms, after.num_experts, floor)


@settings(deadline=None)
@given(inputs())
def test_the_dead_keep_what_they_have_and_what_stays_keeps_its_slot(given: PlanInput) -> None:
    before, after = given.placement, planned(given)
    for layer, (old, new) in enumerate(zip(before.slots, after.slots, strict=True)):
        for physical, expert in enumerate(old):
            rank = before.rank_of(physical)
            stays = expert != EMPTY and expert in after.on_rank(layer, rank)
            if rank not in given.ranks or stays:
                assert new[physical] == expert


@settings(deadline=None)
@given(inputs())
def test_a_plan_is_content_with_what_it_has_made(given: PlanInput) -> None:
    after = planned(given)
    again = plan(PlanInput(after, given.ranks, given.loads, given.spare))
    assert again.imbalance <= plan(given).imbalance * 1.0001


@settings(deadline=None)
@given(inputs(), st.integers(0, 5))
def test_moves_for_balance_are_bounded(given: PlanInput, most: int) -> None:
    needed, bounded = (plan(replace(given, max_moves=moves)).moves for moves in (0, most))
    assert bounded <= needed + most


def test_without_load_only_what_tolerance_needs_is_moved() -> None:
    placement = launch_placement(8, 2, 16, 16)
    quiet = [[0.0] * 16] * 2
    assert plan(PlanInput(placement, tuple(range(8)), quiet)).moves == 0
    lost = plan(PlanInput(placement, tuple(range(1, 8)), quiet))
    assert lost.moves == 0, "seven ranks of four slots cannot hold two copies of sixteen experts"
    roomy = launch_placement(8, 1, 16, 24)
    lost = plan(PlanInput(roomy, tuple(range(1, 8)), [[0.0] * 16]))
    after = Placement(1, 8, 5, 16, lost.slots)
    assert min(after.copies(0, range(1, 8))) == 2
    assert lost.moves == sum(2 - count for count in roomy.copies(0, range(1, 8)) if count < 2)


def test_the_busiest_expert_gets_the_copies_that_tolerance_leaves() -> None:
    loads = [[1.0] * 7 + [50.0]]
    after = planned(PlanInput(launch_placement(4, 1, 8, 4), tuple(range(4)), loads))
    assert after.copies(0, range(4))[7] == 4
    assert min(after.copies(0, range(4))) == 1


def test_the_layer_with_the_worst_balance_is_first_when_moves_are_few() -> None:
    placement = launch_placement(4, 2, 8, 4)
    even, skewed = [1.0] * 7 + [2.0], [1.0] * 7 + [50.0]
    found = plan(PlanInput(placement, tuple(range(4)), [even, skewed], max_moves=2))
    assert found.slots[0] == placement.slots[0]
    assert found.slots[1] != placement.slots[1]


def test_deepseeks_example_is_as_even_as_with_their_algorithm() -> None:
    placement = launch_placement(8, 2, 12, 4)
    loads = [FIRST_EXAMPLE, SECOND_EXAMPLE]
    after = planned(PlanInput(placement, tuple(range(8)), loads))
    for layer, row in enumerate(loads):
        busy = rank_loads(after, layer, range(8), row)
        assert sum(busy) == pytest.approx(sum(row))
        assert max(busy) <= eplb_peak(row, copies=16, ranks=8) * 1.01


def eplb_peak(loads: tuple[int, ...], copies: int, ranks: int) -> float:
    """The load of the busiest rank by replicate-then-pack, two copies of an expert on a rank not minded."""
    counts = [1] * len(loads)
    for _ in range(copies - len(loads)):
        counts[max(range(len(loads)), key=lambda e: loads[e] / counts[e])] += 1
    shares = sorted((load / n for load, n in zip(loads, counts, strict=True) for _ in range(n)), reverse=True)
    packs: list[list[float]] = [[] for _ in range(ranks)]
    for share in shares:
        min((pack for pack in packs if len(pack) < copies // ranks), key=sum).append(share)
    return max(map(sum, packs))


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"loads": [[1.0] * 15]}, "16 experts"),
        ({"loads": [[1.0] * 16] * 2}, "1 layers"),
        ({"ranks": ()}, "at least one rank"),
        ({"spare": 4}, "4 spare slots of 4"),
    ],
)
def test_input_that_makes_no_sense_is_refused(wrong: dict[str, object], match: str) -> None:
    right = {"placement": launch_placement(8, 1, 16, 16), "ranks": tuple(range(8)), "loads": [[1.0] * 16]}
    with pytest.raises(ValueError, match=match):
        PlanInput(**{**right, **wrong})  # type: ignore[arg-type]  # that is the point


@pytest.mark.parametrize("hosts", [(), (0, 0, 0, 0, 1, 1, 1, 1)])
def test_what_is_packed_from_nothing_stays_on_the_ranks_that_have_it(hosts: tuple[int, ...]) -> None:
    """Ranks of a board that is even already change places, on their hosts: no expert has to move."""
    random = Random(1)
    even = packed(Board([random.paretovariate(1.2) for _ in range(24)], [6] * 8, hosts), 0.0)
    turned = Board(even.loads, even.room, hosts)
    for rank, experts in enumerate(even.holds):
        for expert in experts:
            turned.place(expert, rank // 4 * 4 + (rank + 1) % 4)
    turned.count_loads()
    assert even.moves_to(turned) > 0
    seat_again(even, turned)
    assert even.moves_to(turned) == 0
    assert even.busy == pytest.approx(turned.busy)
    assert even.where == turned.where


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10**9), st.integers(2, 4), st.integers(1, 3))
def test_balance_costs_no_expert_a_host(seed: int, hosts: int, each: int) -> None:
    """A few experts have nearly all the load, and copies to spare lie anywhere."""
    random, experts = Random(seed), 8
    ranks = hosts * each
    board = Board(
        [random.choice([1.0, 5.0, 200.0]) for _ in range(experts)],
        [2 * experts // each] * ranks,
        [rank // each for rank in range(ranks)],
    )
    for expert in range(experts):
        for rank in random.sample(range(ranks), random.randint(1, ranks)):
            if board.has_room(rank):
                board.place(expert, rank)
    board.count_loads()
    board.restore()
    short = board.short
    for _ in range(6):
        board.balance(1.0, 3, 1)
        assert board.short <= short


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 50).map(float), min_size=2, max_size=6),
    st.integers(2, 5),
    st.randoms(use_true_random=False),
)
def test_a_board_that_is_balanced_and_changed_is_one_that_was_counted_anew(
    loads: list[float], ranks: int, random: Random
) -> None:
    """Loads, shares and the orders that are kept follow every change."""
    board = Board(loads, [len(loads)] * ranks)
    for expert in range(len(loads)):
        for rank in random.sample(range(ranks), random.randint(1, ranks)):
            board.place(expert, rank)
    board.count_loads()
    board.balance(1.0, random.randint(0, 9), 9)
    for _ in range(9):
        expert, rank = random.randrange(len(loads)), random.randrange(ranks)
        if board.fits(expert, rank):
            giver = random.choice(sorted(board.where[expert]))
            board.apply(random.choice([Edit(add=((expert, rank),)), Edit(move=((expert, giver, rank),))]))
        elif len(board.where[expert]) > 1:
            board.apply(Edit(drop=((expert, rank),)))
    anew = board.copy()
    anew.count_loads()
    anew.balance(1e9, 0, 0)  # makes the orders
    assert board.busy == pytest.approx(anew.busy)
    assert board.share == anew.share
    assert (board._light, board._spare) == (anew._light, anew._spare)
    held = {(expert, rank) for rank, experts in enumerate(board.holds) for expert in experts}
    assert held == {(expert, rank) for expert, holders in enumerate(board.where) for rank in holders}
