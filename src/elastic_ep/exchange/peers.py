"""Who takes part in the exchange, as one rank sees it."""

from __future__ import annotations

import threading
from collections.abc import Iterable

import numpy as np

from elastic_ep.wire.messages import Member

_NEVER = -1


class Peers:
    """Active and masked incarnations. `mask` and `is_masked` on any thread, all else on the forward thread.

    Who takes part from now on is kept in three forms; any of them may turn False at any moment. `live` is indexed
    by rank, `live_array` too, and `reachable` by physical expert; its last element, which the index -1 selects,
    stands for `NO_EXPERT` and is always False.
    """

    def __init__(self, me: Member, num_ranks: int, slots_per_rank: int) -> None:
        if not 0 <= me.rank < num_ranks:
            raise ValueError(f"rank {me.rank} is not one of {num_ranks} ranks")
        self.live = [False] * num_ranks
        self.live_array = np.zeros(num_ranks, np.bool_)
        self.reachable = np.zeros(num_ranks * slots_per_rank + 1, np.bool_)
        self._slots_per_rank = slots_per_rank
        self._lock = threading.Lock()
        self._active = [_NEVER] * num_ranks
        # An incarnation starts only after all earlier ones are gone, so one number says which are masked.
        self._masked = [_NEVER] * num_ranks
        self._lost: set[int] = set()
        self.activate(me)

    def activate(self, member: Member) -> None:
        rank, incarnation = member
        with self._lock:
            if incarnation <= self._masked[rank] or incarnation < self._active[rank]:
                return
            self._active[rank] = incarnation
            self._masked[rank] = max(self._masked[rank], incarnation - 1)
            self._set_live(rank, True)

    def mask(self, member: Member) -> None:
        rank, incarnation = member
        with self._lock:
            self._masked[rank] = max(self._masked[rank], incarnation)
            if self.live[rank] and self._active[rank] <= incarnation:
                self._lost.add(rank)
                self._set_live(rank, False)

    def is_masked(self, member: Member) -> bool:
        return member.incarnation <= self._masked[member.rank]

    def begin_step(self) -> None:
        """Whoever is masked by now takes no part in the step and cannot poison it, unless it is `miss`ed."""
        with self._lock:
            self._lost.clear()

    def miss(self, ranks: Iterable[int]) -> None:
        """Something was sent to these ranks, which do not take part."""
        with self._lock:
            self._lost.update(ranks)

    def end_step(self) -> frozenset[int]:
        with self._lock:
            lost = frozenset(self._lost)
            self._lost.clear()
            return lost

    def _set_live(self, rank: int, live: bool) -> None:
        self.live[rank] = live
        self.live_array[rank] = live
        self.reachable[rank * self._slots_per_rank : (rank + 1) * self._slots_per_rank] = live
