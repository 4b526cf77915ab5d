"""The exchange of ranks on one machine: windows in shared memory, a futex to sleep on.

Ranks of other hosts have their part of the windows, too, which the host's carrier writes as they would (`mirror.py`).

The words are 64 bits wide and never wrap: one that a dead rank left behind stays in the past for ever.
"""

from __future__ import annotations

import mmap
import os

from elastic_ep.exchange.base import ExchangeShape
from elastic_ep.exchange.bell import FutexBell
from elastic_ep.exchange.carried import Carried
from elastic_ep.exchange.pull import HERE, STRIDE, PullExchange
from elastic_ep.exchange.windows import Windows
from elastic_ep.wire.messages import Member


class ShmExchange(PullExchange):
    """One rank's end over the windows behind `fd` (see `Windows.create`), which stays the caller's to close.

    Raises ValueError when the file is not laid out for `shape`.
    """

    def __init__(self, fd: int, shape: ExchangeShape, member: Member) -> None:
        total = Windows.layout(shape).total
        size = os.fstat(fd).st_size
        self._carried = Carried(fd, shape) if Carried.is_there(fd, shape) else None
        if size != total and self._carried is None:
            raise ValueError(f"the exchange windows have {size} bytes, but {shape} needs {total}")
        buffer = memoryview(mmap.mmap(fd, total))
        self._door = bell = FutexBell(buffer, shape.num_ranks)
        super().__init__(buffer, shape, member, bell, carried=self._carried is not None)

    def _post(self) -> None:
        super()._post()
        if self._carried is not None and not any(map(self._awaited_here, self._order)):
            self._door.knock()

    def _awaited_here(self, rank: int) -> bool:
        """Whether it is of this host, and has not posted yet: it will knock."""
        posted, here = self._words[rank * STRIDE], self._words[rank * STRIDE + HERE]
        return bool(here) and posted < self._number and self._peers.live[rank]

    def mask(self, member: Member) -> None:
        if self._carried is not None:
            self._carried.mask(self.member.rank, member)
        super().mask(member)
