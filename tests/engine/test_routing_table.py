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
    return Placement(0, ranks, width, experts, tuple(map(tuple, rows)))


@settings(deadline=None)
@given(placements(), st.data())
def test_copies_are_chosen_by_the_rule(placement: Placement, data: st.DataObject) -> None:
    ranks = st.integers(0, placement.num_ranks - 1)
    active, rank = data.draw(st.sets(ranks)), data.draw(ranks)
    chosen = Copies(placement).choose(active, rank)
    assert chosen.tolist() == choose_plainly(placement, active, rank)


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
