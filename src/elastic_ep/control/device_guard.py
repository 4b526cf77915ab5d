"""Lets the kernels of a dead rank end before its memory goes: for ranks that share a GPU through MPS.

See device_hold.py for why. A dead rank's kernels end by themselves, as nobody queues others. But its peers go on without
it, so their signals may miss its operations: then its kernels wait until the exchange's own timeout, at worst once for
each peer, one after the other.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Callable
from types import TracebackType

from elastic_ep.control.device_hold import DeviceHold
from elastic_ep.messages import Member

Note = Callable[..., None]


class DeviceGuard:
    """A context manager for the event loop's thread; on exit the driver may take everything back.

    `drain_s` is how long the kernels of a dead rank may run; `note(name, **facts)` is told what is held and let go.
    """

    def __init__(self, drain_s: float, note: Note) -> None:
        self._loop = asyncio.get_running_loop()
        self._drain_s = drain_s
        self._note = note
        self._alive: dict[Member, DeviceHold] = {}
        self._draining: dict[Member, DeviceHold] = {}
        self._busy: Counter[int] = Counter()
        self._waiting: defaultdict[int, list[Callable[[], None]]] = defaultdict(list)
        self._closed = False

    def __enter__(self) -> DeviceGuard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed = True
        for hold in (*self._alive.values(), *self._draining.values()):
            hold.release()

    def hold(self, member: Member, pid: int) -> None:
        """Take note of what `member` has opened by now; call it again when that may have grown."""
        try:
            hold = DeviceHold(pid)
        except OSError as error:  # it is gone, or not to be looked into: then its death may harm others
            self._note("device_not_held", rank=member.rank, incarnation=member.incarnation, reason=str(error))
            return
        before = self._alive.pop(member, None)
        if before is not None:
            before.release()
        self._alive[member] = hold
        self._note("device_held", rank=member.rank, incarnation=member.incarnation, files=len(hold))

    def gone(self, member: Member) -> None:
        """The process is gone. Idempotent."""
        hold = self._alive.pop(member, None)
        if hold is not None:
            self._draining[member] = hold
            self._busy[member.rank] += 1
            self._loop.call_later(self._drain_s, self._release, member)

    def when_free(self, rank: int, then: Callable[[], None]) -> None:
        """Call `then`, now or when nothing of a dead incarnation of `rank` is on the device any more."""
        if self._busy[rank]:
            self._waiting[rank].append(then)
        else:
            then()

    def _release(self, member: Member) -> None:
        if not self._closed:
            hold = self._draining.pop(member)
            # On another thread: the driver keeps the caller until it has taken everything back.
            self._loop.run_in_executor(None, hold.release).add_done_callback(lambda _: self._released(member))

    def _released(self, member: Member) -> None:
        self._busy[member.rank] -= 1
        self._note("device_released", rank=member.rank, incarnation=member.incarnation)
        if not self._busy[member.rank]:
            for then in self._waiting.pop(member.rank, []):
                then()
