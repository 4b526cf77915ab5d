"""Which physical expert holds which logical expert.

Physical expert `p` is slot `p % slots_per_rank` of rank `p // slots_per_rank`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

EMPTY = -1


@dataclass(frozen=True, slots=True)
class Placement:
    """`slots[layer][physical]` is the logical expert there, or `EMPTY`. A new `version` for every change."""

    version: int
    num_ranks: int
    slots_per_rank: int
    num_experts: int
    slots: tuple[tuple[int, ...], ...]

    def on_rank(self, layer: int, rank: int) -> tuple[int, ...]:
        """The logical expert of each slot of `rank`, shape [slots_per_rank]."""
        start = rank * self.slots_per_rank
        return self.slots[layer][start : start + self.slots_per_rank]

    def covered_by(self, ranks: Collection[int]) -> bool:
        """Whether every logical expert of every layer has a copy on one of `ranks`."""
        for layer in range(len(self.slots)):
            held = {expert for rank in ranks for expert in self.on_rank(layer, rank)}
            if not held.issuperset(range(self.num_experts)):
                return False
        return True

    def tolerates(self, ranks: Collection[int]) -> int:
        """How many more of `ranks` can be lost, in the worst case, with every expert still alive; -1: held now."""
        fewest = min(
            sum(1 for rank in ranks if expert in self.on_rank(layer, rank))
            for layer in range(len(self.slots))
            for expert in range(self.num_experts)
        )
        return fewest - 1


def launch_placement(num_ranks: int, num_layers: int, num_experts: int, num_redundant: int) -> Placement:
    """The placement a group starts with, the same in every layer.

    Copies are dealt like cards, so that no rank holds two copies of an expert, and the second copies of one
    rank's experts lie on several other ranks. A copy that could only double up on its rank is left out.
    """
    total = num_experts + num_redundant
    slots_per_rank = -(-total // num_ranks)
    hands: list[list[int]] = [[] for _ in range(num_ranks)]
    for copy in range(-(-total // num_experts)):
        wanted = min(num_experts, total - copy * num_experts)
        for expert in range(wanted):
            start = expert * num_ranks // num_experts + copy + (copy * expert if num_ranks > 2 else 0)
            rank = _first_free(hands, start, expert, slots_per_rank)
            if rank is not None:
                hands[rank].append(expert)
    row = tuple(expert for hand in hands for expert in hand + [EMPTY] * (slots_per_rank - len(hand)))
    return Placement(0, num_ranks, slots_per_rank, num_experts, (row,) * num_layers)


def _first_free(hands: list[list[int]], start: int, expert: int, capacity: int) -> int | None:
    order = [(start + offset) % len(hands) for offset in range(len(hands))]
    free = [rank for rank in order if len(hands[rank]) < capacity and expert not in hands[rank]]
    return free[0] if free else None
