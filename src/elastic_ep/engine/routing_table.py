"""Which copy of each logical expert a rank sends its tokens to."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import numpy.typing as npt
import torch

from elastic_ep.placement import EMPTY, Placement

_Ints = npt.NDArray[np.int64]
NO_COPY = -1


class RoutingTable:
    """`physical` [layers, experts] int64: the copy of each logical expert that this rank sends to.

    Updated in place, so that whoever captured its address sees the new view.
    """

    def __init__(self, layers: int, experts: int, device: torch.device) -> None:
        self.physical = torch.zeros(layers, experts, dtype=torch.int64, device=device)
        self._copies: Copies | None = None

    def update(self, placement: Placement, active_ranks: Collection[int], rank: int) -> bool:
        """Choose among the copies on `active_ranks`. False, and no change, if some expert has none.

        Survivors of a loss wait for this at their boundary: what depends on the placement alone is kept.
        """
        if self._copies is None or self._copies.placement is not placement:
            self._copies = Copies(placement)
        chosen = self._copies.choose(active_ranks, rank)
        if (chosen == NO_COPY).any():
            return False
        self.physical.copy_(torch.from_numpy(chosen))
        return True


class Copies:
    """All copies of a placement, ordered by layer, logical expert and physical expert."""

    def __init__(self, placement: Placement) -> None:
        self.placement = placement
        slots: _Ints = np.array(placement.slots, dtype=np.int64)
        layer, physical = np.nonzero(slots != EMPTY)
        expert = layer * placement.num_experts + slots[layer, physical]
        order = np.argsort(expert, kind="stable")
        self._expert: _Ints = expert[order]
        """Of each copy, counted through all layers."""
        self._physical: _Ints = physical[order]
        self._rank: _Ints = self._physical // placement.slots_per_rank

    def choose(self, active_ranks: Collection[int], rank: int) -> _Ints:
        """[layers, experts]: the physical expert for `rank` to use: its own copy, else one on `active_ranks`.

        (rank + expert) picks among several, so that the ranks spread their load over the copies. `NO_COPY` where there
        is none.
        """
        active = np.zeros(self.placement.num_ranks, np.bool_)
        active[list(active_ranks)] = True
        living = active[self._rank]
        expert, physical = self._expert[living], self._physical[living]
        layers, experts = len(self.placement.slots), self.placement.num_experts
        count = np.bincount(expert, minlength=layers * experts)
        first = count.cumsum() - count
        pick = first + (rank + np.arange(layers * experts) % experts) % np.maximum(count, 1)
        chosen: _Ints = np.full(layers * experts, NO_COPY)
        chosen[count > 0] = physical[pick[count > 0]]
        own = self._rank[living] == rank
        chosen[expert[own]] = physical[own]
        return chosen.reshape(layers, experts)
