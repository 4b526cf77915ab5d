"""Which physical expert holds which logical expert.

Physical expert `p` is slot `p % slots_per_rank` of rank `p // slots_per_rank`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

EMPTY = -1


class Change(NamedTuple):
    """Slot `physical` of `layer` now holds `logical` (or `EMPTY`)."""

    layer: int
    physical: int
    logical: int


@dataclass(frozen=True, slots=True)
class Placement:
    """`slots[layer][physical]` is the logical expert there, or `EMPTY`. A new `version` for every change."""

    version: int
    num_ranks: int
    slots_per_rank: int
    num_experts: int
    slots: tuple[tuple[int, ...], ...]

    def changed(self, version: int, changes: Iterable[Change]) -> Placement:
        """The placement with `changes` made. Layers without a change are shared with this one."""
        changed: dict[int, list[int]] = {}
        for layer, physical, logical in changes:
            changed.setdefault(layer, list(self.slots[layer]))[physical] = logical
        rows = list(self.slots)
        for layer, row in changed.items():
            rows[layer] = tuple(row)
        return replace(self, version=version, slots=tuple(rows))

    def rank_of(self, physical: int) -> int:
        return physical // self.slots_per_rank

    def copies(self, layer: int, ranks: Collection[int]) -> list[int]:
        """How many of `ranks` hold each logical expert, shape [num_experts]."""
        counts = [0] * self.num_experts
        for rank in ranks:
            for expert in set(self.on_rank(layer, rank)) - {EMPTY}:
                counts[expert] += 1
        return counts

    def on_rank(self, layer: int, rank: int) -> tuple[int, ...]:
        """The logical expert of each slot of `rank`, shape [slots_per_rank]."""
        start = rank * self.slots_per_rank
        return self.slots[layer][start : start + self.slots_per_rank]

    def tolerates(self, ranks: Collection[int]) -> int:
        """How many more of `ranks` can be lost, in the worst case, with every expert still alive; -1: held now."""
        return min(min(self.copies(layer, ranks)) for layer in range(len(self.slots))) - 1


@dataclass(frozen=True, slots=True)
class Coverage:
    """Whether some ranks hold every expert of a placement: asked at every event, so a matter of a few operations.

    `held[rank]` has a bit for every (layer, logical expert) that the rank holds, `everything` all of them.
    """

    held: tuple[int, ...]
    everything: int

    @classmethod
    def of(cls, placement: Placement) -> Coverage:
        held = tuple(_held(placement, rank) for rank in range(placement.num_ranks))
        return cls(held, (1 << len(placement.slots) * placement.num_experts) - 1)

    def after(self, changes: Iterable[Change], placement: Placement) -> Coverage:
        """That of `placement`, which `changes` led to."""
        touched = {placement.rank_of(change.physical) for change in changes}
        held = [
            _held(placement, rank) if rank in touched else before for rank, before in enumerate(self.held)
        ]
        return replace(self, held=tuple(held))

    def by(self, ranks: Iterable[int]) -> bool:
        """Whether every logical expert of every layer has a copy on one of `ranks`."""
        held = 0
        for rank in ranks:
            held |= self.held[rank]
        return held == self.everything


def _held(placement: Placement, rank: int) -> int:
    held = 0
    for layer in range(len(placement.slots)):
        in_layer = 0
        for expert in placement.on_rank(layer, rank):
            if expert != EMPTY:
                in_layer |= 1 << expert
        held |= in_layer << layer * placement.num_experts
    return held


def launch_placement(
    num_ranks: int, num_layers: int, num_experts: int, num_redundant: int, num_spare: int = 0
) -> Placement:
    """The placement a group starts with, the same in every layer.

    Every expert has as many copies as every other, or one more, each on another rank; a copy beyond one on each
    rank is left out. An expert's copies go to the emptiest ranks, which keeps all ranks within one copy of each
    other, so that the slots always suffice. Among equally empty ranks those win that share the fewest experts, so
    that what a lost rank held is spread over many survivors. `num_spare` slots of every rank stay empty.
    """
    total = num_experts + num_redundant
    slots_per_rank = -(-total // num_ranks) + num_spare
    hands: list[list[int]] = [[] for _ in range(num_ranks)]
    shared = [[0] * num_ranks for _ in range(num_ranks)]
    for expert in range(num_experts):
        copies = total // num_experts + (expert < total % num_experts)
        holders: list[int] = []
        for _ in range(min(copies, num_ranks)):
            others = [rank for rank in range(num_ranks) if rank not in holders]
            holders.append(min(others, key=lambda rank: (len(hands[rank]), _overlap(shared[rank], holders))))
        for rank in holders:
            hands[rank].append(expert)
            for other in holders:
                shared[rank][other] += 1
    row = tuple(expert for hand in hands for expert in hand + [EMPTY] * (slots_per_rank - len(hand)))
    return Placement(0, num_ranks, slots_per_rank, num_experts, (row,) * num_layers)


def _overlap(shared: list[int], holders: list[int]) -> int:
    return sum(shared[holder] for holder in holders)
