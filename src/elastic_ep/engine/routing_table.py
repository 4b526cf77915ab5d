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

        (rank + expert) picks among several, so that the ranks spread their load over the copies. Those on the rank's host
        go first as far as that leaves the load even (see `_near`). `NO_COPY` where there is none.
        """
        active = np.zeros(self.placement.num_ranks, np.bool_)
        active[list(active_ranks)] = True
        living = active[self._rank]
        expert, physical = self._expert[living], self._physical[living]
        chosen = self._pick(expert, physical, rank)
        if len(set(self.placement.hosts)) > 1 and active[rank]:
            self._near(chosen, expert, physical, active, rank)
        own = self._rank[living] == rank
        chosen[expert[own]] = physical[own]
        return chosen.reshape(len(self.placement.slots), self.placement.num_experts)

    def _pick(self, expert: _Ints, physical: _Ints, rank: int) -> _Ints:
        """One of the copies of each expert, [layers * experts]."""
        layers, experts = len(self.placement.slots), self.placement.num_experts
        count = np.bincount(expert, minlength=layers * experts)
        first = count.cumsum() - count
        pick = first + (rank + np.arange(layers * experts) % experts) % np.maximum(count, 1)
        chosen: _Ints = np.full(layers * experts, NO_COPY)
        chosen[count > 0] = physical[pick[count > 0]]
        return chosen

    def _near(
        self, chosen: _Ints, expert: _Ints, physical: _Ints, active: npt.NDArray[np.bool_], rank: int
    ) -> None:
        """Change `chosen` to copies on the own host, where its ranks need no more than their share of all copies.

        A host that has so many of the copies should have so many of the ranks as users. If its own are more, those beyond
        it, which are others for each expert, go to hosts that have too few, and so do ranks of hosts without a copy.
        """
        hosts = np.array(self.placement.hosts, dtype=np.int64)
        users = np.bincount(hosts[active], minlength=hosts.max() + 1)
        """Active ranks of each host."""
        total, here = int(active.sum()), hosts[rank]
        all_experts = len(chosen)
        at = hosts[physical // self.placement.slots_per_rank]
        count = np.bincount(expert, minlength=all_experts)
        on_host = np.bincount(expert * len(users) + at, minlength=all_experts * len(users))
        room = users[at] * count[expert] < on_host[expert * len(users) + at] * total
        elsewhere = self._pick(expert[room], physical[room], rank)
        near = self._pick(expert[at == here], physical[at == here], rank)
        place = int((active[:rank] & (hosts[:rank] == here)).sum())
        turn = (place + np.arange(all_experts) % self.placement.num_experts) % users[here]
        own = on_host[here :: len(users)]
        stays = (2 * turn + 1) * count <= 2 * own * total
        chosen[:] = np.where(elsewhere != NO_COPY, elsewhere, chosen)
        chosen[:] = np.where(stays & (near != NO_COPY), near, chosen)
