"""Which slots a layer may use, after any moves, is what the definition says; and it is known without looking for it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic_ep.machines.experts.moves import Layer
from elastic_ep.placement import EMPTY, Change, Placement, launch_placement


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    ranks, experts, width = draw(st.integers(1, 5)), draw(st.integers(1, 10)), draw(st.integers(1, 6))
    row: list[int] = []
    for _ in range(ranks):
        held = draw(st.lists(st.integers(0, experts - 1), unique=True, max_size=width))
        row += draw(st.permutations(held + [EMPTY] * (width - len(held))))
    living = draw(st.sets(st.integers(0, ranks - 1)))
    empty = [slot for slot, held in enumerate(row) if held == EMPTY and slot // width in living]
    coming, closed = {}, set()
    for slot in empty:
        rank = slot // width
        expert = draw(st.integers(-2, experts - 1))
        if expert == -2:
            closed.add(slot)
        elif expert >= 0 and expert not in row[rank * width : (rank + 1) * width]:
            coming[slot] = expert
    given_up = draw(st.sets(st.sampled_from(sorted(coming)))) if coming else set()
    placement = Placement(0, ranks, width, experts, (tuple(row),))
    return Layer(placement, 0, living, draw(st.integers(1, 3)), coming, given_up, closed)


def usable(layer: Layer) -> list[int]:
    empty = [
        slot
        for slot in layer.slots
        if layer.row[slot] == EMPTY and slot not in layer.taken and slot not in layer.closed
    ]
    copies = {slot: layer.living[layer.row[slot]] for slot in layer.slots if layer.row[slot] != EMPTY}
    surplus = [slot for slot, count in copies.items() if count > layer.wanted]
    return empty + sorted(surplus, key=lambda slot: -copies[slot])


@given(layers())
def test_what_may_be_used_after_each_move(layer: Layer) -> None:
    assert list(layer._usable()) == usable(layer)
    for change in layer.restore():
        if change.logical != EMPTY:  # else the slot is about to be taken
            assert list(layer._usable()) == usable(layer)


def test_experts_without_a_place_are_not_looked_for_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five ranks of eight are left: they cannot hold all experts."""
    experts = 512
    looks: Counter[str] = Counter()

    def count(name: str) -> None:
        look = getattr(Layer, name)

        def counted(self: Layer, *asked: int) -> Any:
            looks[name] += 1
            return look(self, *asked)

        monkeypatch.setattr(Layer, name, counted)

    count("_fits")
    count("_is_free")
    placement = launch_placement(8, 1, experts, 64, 1)
    layer = Layer(placement, 0, range(3, 8), wanted=1, coming={}, given_up=(), closed=())
    placed = [change.logical for change in layer.restore() if change.logical != EMPTY]
    lost = sum(count == 0 for count in placement.copies(0, range(3, 8)))
    assert 0 < len(placed) < lost
    assert looks.total() <= len(layer.slots) + 8 * lost


def test_what_makes_way_does_not_leave_its_last_copy_on_a_host() -> None:
    """Expert 0 should be on the second host, too, which is full; 1 could go, but would then be on the first alone."""
    placement = Placement(0, 3, 2, 3, ((0, 1, 2, EMPTY, 1, 2),), (0, 0, 1))
    layer = Layer(placement, 0, range(3), wanted=2, coming={}, given_up=(), closed=(), spread=2)
    assert list(layer.restore()) == [Change(0, 3, 0)], "a second copy on the first host is all there can be"
