"""Whether a silent rank hangs or just does not get a processor: what the kernel says of its threads."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from elastic_ep.machines.membership.progress import Starved
from elastic_ep.wire.messages import Member


@dataclass(frozen=True, slots=True)
class _Thread:
    """`ran_ns` and `waited_ns` are the kernel's sums. It adds to the second only when the wait is over, so
    `ready_since_ns` says since when the thread has been seen ready without running; None: it is not. `counted_ns` was
    reported already.
    """

    ran_ns: int
    waited_ns: int
    ready: bool
    seen_ns: int
    ready_since_ns: int | None = None
    counted_ns: int = 0

    def total_ns(self) -> int:
        waiting_ns = 0 if self.ready_since_ns is None else self.seen_ns - self.ready_since_ns
        return self.waited_ns + waiting_ns


class Starvation:
    """Looks at few processes and seldom: at those that are in doubt. `proc` stands in for /proc in tests.

    Reading a process' threads takes some 20 us each. Where the kernel keeps no such statistics nobody is ever starved.
    """

    def __init__(self, proc: Path = Path("/proc")) -> None:
        self._proc = proc
        self._seen: dict[Member, dict[int, _Thread]] = {}

    def sample(self, pids: Mapping[Member, int], now_ns: int | None = None) -> tuple[Starved, ...]:
        """How long the threads of each process waited for a processor since the last sample, if it was in that, too."""
        now_ns = time.monotonic_ns() if now_ns is None else now_ns
        found = []
        seen: dict[Member, dict[int, _Thread]] = {}
        for member, pid in pids.items():
            before = self._seen.get(member)
            threads = {
                tid: self._look(pid, tid, now_ns, (before or {}).get(tid)) for tid in self._threads(pid)
            }
            seen[member] = {tid: thread for tid, thread in threads.items() if thread is not None}
            if before is not None:
                waited_ns = sum(
                    max(0, thread.total_ns() - thread.counted_ns)
                    for tid, thread in seen[member].items()
                    if tid in before
                )
                if waited_ns:
                    found.append(Starved(member, waited_ns // 1_000_000))
        self._seen = seen
        return tuple(found)

    def _threads(self, pid: int) -> list[int]:
        try:
            return [int(name) for name in os.listdir(self._proc / str(pid) / "task")]
        except OSError:
            return []

    def _look(self, pid: int, tid: int, now_ns: int, before: _Thread | None) -> _Thread | None:
        """The thread now; None if it is gone, or nothing is known of it."""
        folder = self._proc / str(pid) / "task" / str(tid)
        try:
            ran_ns, waited_ns, _ = map(int, (folder / "schedstat").read_text().split())
            ready = (folder / "stat").read_text().rpartition(")")[2].split()[0] == "R"
        except (OSError, ValueError, IndexError):
            return None
        if before is None:
            return _Thread(ran_ns, waited_ns, ready, now_ns, None, waited_ns)
        since_ns = None
        if ready and before.ready and before.ran_ns == ran_ns:
            since_ns = before.ready_since_ns if before.ready_since_ns is not None else before.seen_ns
        counted_ns = max(before.counted_ns, before.total_ns())
        return _Thread(ran_ns, waited_ns, ready, now_ns, since_ns, counted_ns)
