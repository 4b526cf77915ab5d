"""The routing table against the rule written down plainly."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from elastic_ep.engine.routing_table import Copies, RoutingTable
from elastic_ep.placement import EMPTY, Change, Placement, launch_placement
from tests.kit.plain_routing import choose_plainly


@st.composite
def placements(draw: st.DrawFn) -> Placement:
    """No two copies of an expert on a rank, as repair keeps it; slots in any order, some of them empty."""
    ranks, width = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    experts = draw(st.integers(1, 6))
    held = st.lists(st.integers(0, experts - 1), max_size=width, unique=True).flatmap(
        lambda hand: st.permutations([*hand, *[EMPTY] * (width - len(hand))])
    )
    layers = draw(st.integers(1, 3))
    rows = [[slot for _ in range(ranks) for slot in draw(held)] for _ in range(layers)]
    hosts = draw(st.lists(st.integers(0, 2), min_size=ranks, max_size=ranks))
    return Placement(
        0, ranks, width, experts, tuple(map(tuple, rows)), draw(st.sampled_from([(), tuple(hosts)]))
    )


@settings(deadline=None)
@given(placements(), st.data())
def test_copies_are_chosen_by_the_rule(placement: Placement, data: st.DataObject) -> None:
    ranks = st.integers(0, placement.num_ranks - 1)
    active, rank = data.draw(st.sets(ranks)), data.draw(ranks)
    chosen = Copies(placement).choose(active, rank)
    assert chosen.tolist() == choose_plainly(placement, active, rank)


@pytest.mark.parametrize("each", [1, 2, 4])
@pytest.mark.parametrize("hosts", [2, 3, 4])
def test_ranks_use_copies_of_their_host_and_the_load_stays_even(hosts: int, each: int) -> None:
    """With a copy on every host nothing leaves it, and with fewer, copies have as many users as without hosts."""
    ranks = range(hosts * each)
    host = [rank // each for rank in ranks]
    for copies in range(1, hosts + 1):
        placement = launch_placement(len(ranks), 1, 24, 24 * (copies - 1), hosts=host)
        chosen = [Copies(placement).choose(ranks, rank)[0].tolist() for rank in ranks]
        there = [[host[placement.rank_of(physical)] for physical in row] for row in chosen]
        at_home = sum(row.count(host[rank]) for rank, row in enumerate(there))
        assert at_home >= 24 * copies * each, "who has a copy on its host uses it"
        for expert in range(24):
            users = [there[rank][expert] for rank in ranks]
            fair = len(ranks) / copies
            assert all(fair - 1 <= users.count(one) <= fair + 1 for one in set(users))


def test_a_host_with_more_ranks_than_its_copies_should_serve_sends_some_elsewhere() -> None:
    """Ranks 0 to 4 on one host, rank 5 on another; experts 0 to 5 on ranks 0 and 5."""
    slots = (*range(6), *[EMPTY] * 24, *range(6))
    placement = Placement(0, 6, 6, 6, (slots,), (0, 0, 0, 0, 0, 1))
    chosen = [Copies(placement).choose(range(6), rank)[0].tolist() for rank in range(6)]
    remote = [sum(chosen[rank][expert] >= 30 for rank in range(1, 5)) for expert in range(6)]
    assert all(1 <= count <= 2 for count in remote), (
        "three of six users for each copy, but rank 0 uses its own"
    )
    each = [sum(physical >= 30 for physical in chosen[rank]) for rank in range(1, 5)]
    assert max(each) - min(each) <= 2, "the ranks take turns"


@pytest.fixture
def table() -> RoutingTable:
    return RoutingTable(2, 4, torch.device("cpu"))


def test_a_lost_last_copy_leaves_the_table_as_it_was(table: RoutingTable) -> None:
    placement = launch_placement(4, 2, 4, 0)
    assert table.update(placement, range(4), 0)
    before, address = table.physical.clone(), table.physical.data_ptr()
    assert not table.update(placement, {0, 1, 2}, 0)
    assert torch.equal(table.physical, before)
    assert table.physical.data_ptr() == address, "a captured graph reads the old address"


def test_a_new_placement_is_followed(table: RoutingTable) -> None:
    placement = launch_placement(2, 2, 4, 0, num_spare=1)
    assert table.update(placement, range(2), 0)
    expert = placement.slots[1][placement.slots_per_rank]
    spare = placement.on_rank(1, 0).index(EMPTY)
    assert table.update(placement.changed(1, [Change(1, spare, expert)]), range(2), 0)
    assert table.physical[1, expert] == spare
    assert table.physical[0, expert] == placement.slots_per_rank, "the other layer was not changed"
