"""Lets the kernels of a dead rank end before its memory goes: for ranks that share a GPU through MPS.

See device_files.py for why. A dead rank's kernels end by themselves, as nobody queues others. But its peers go on without
it, so their signals may miss its operations: then its kernels wait until the exchange's own timeout, at worst once for
each peer, one after the other.
"""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from types import TracebackType

from elastic_ep.event_log.log import Note
from elastic_ep.host.device_files import DeviceFiles
from elastic_ep.wire.messages import Member


class DeviceGuard:
    """A context manager for the event loop's thread; on exit the driver may take everything back, which ends after it.

    `drain_s` is how long the kernels of a dead rank may run; `note(name, **facts)` is told what is kept and let go.
    """

    def __init__(self, drain_s: float, note: Note) -> None:
        self._loop = asyncio.get_running_loop()
        self._drain_s = drain_s
        self._note = note
        self._alive: defaultdict[Member, list[DeviceFiles]] = defaultdict(list)
        """The last complete one, and those after it: they need not have all."""
        self._draining: dict[Member, list[DeviceFiles]] = {}
        self._busy: Counter[int] = Counter()
        self._waiting: defaultdict[int, list[Callable[[], None]]] = defaultdict(list)
        self._closed = False

    def __enter__(self) -> DeviceGuard:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closed = True
        for kept in (*self._alive.values(), *self._draining.values()):
            self._let_go(kept)

    def keep(self, member: Member, pid: int) -> None:
        """Take note of what `member` has opened by now; call it again when that may have grown.

        It takes some 2 ms for 200 descriptors. What a living process has closed itself is let go.
        """
        try:
            files = DeviceFiles(pid)
        except OSError as error:  # it is gone, or not to be looked into: then its death may harm others
            self._note("device_not_kept", rank=member.rank, incarnation=member.incarnation, reason=str(error))
            return
        older = self._alive[member]
        if not older or len(files) != len(older[-1]):
            self._note("device_kept", rank=member.rank, incarnation=member.incarnation, files=len(files))
        if files.complete:
            self._alive[member] = [files]
            self._let_go(older)
        else:
            older.append(files)

    def gone(self, member: Member) -> None:
        """The process is gone. Idempotent."""
        kept = self._alive.pop(member, [])
        if any(map(len, kept)):
            self._draining[member] = kept
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
            self._let_go(self._draining.pop(member)).add_done_callback(lambda _: self._released(member))

    def _let_go(self, kept: Sequence[DeviceFiles]) -> asyncio.Future[None]:
        """On another thread: the driver keeps the caller until it has taken everything back."""
        return self._loop.run_in_executor(None, _release, kept)

    def _released(self, member: Member) -> None:
        self._busy[member.rank] -= 1
        self._note("device_released", rank=member.rank, incarnation=member.incarnation)
        if not self._busy[member.rank]:
            for then in self._waiting.pop(member.rank, []):
                then()


def _release(kept: Sequence[DeviceFiles]) -> None:
    for files in kept:
        files.release()
