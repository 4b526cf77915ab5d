"""Counts the rows that this rank's slots compute, by logical expert."""

from __future__ import annotations

from collections.abc import MutableSequence, Sequence

from elastic_ep.placement import EMPTY, Placement


class ExpertLoad:
    """`by_slot[layer][slot]` is added to in every layer of every step; the rest happens at boundaries.

    It may be given, if who counts keeps it.
    """

    def __init__(
        self, placement: Placement, rank: int, by_slot: Sequence[MutableSequence[int]] | None = None
    ) -> None:
        layers = range(len(placement.slots))
        self.by_slot = by_slot or [[0] * placement.slots_per_rank for _ in layers]
        self._by_expert = [[0] * placement.num_experts for _ in layers]
        self._placement = placement
        self._rank = rank

    def adopt(self, placement: Placement) -> None:
        """What was counted so far belongs to the experts of the placement before."""
        self._settle()
        self._placement = placement

    def cut(self) -> None:
        """The next `take` need not wait for what is launched from now on."""

    def take(self) -> tuple[tuple[int, ...], ...]:
        """[layers][logical experts]: rows since the last call."""
        self._settle()
        taken = tuple(tuple(row) for row in self._by_expert)
        for row in self._by_expert:
            row[:] = [0] * len(row)
        return taken

    def _settle(self) -> None:
        for layer, counts in enumerate(self.by_slot):
            for slot, logical in enumerate(self._placement.on_rank(layer, self._rank)):
                if logical != EMPTY:
                    self._by_expert[layer][logical] += counts[slot]
                counts[slot] = 0
