"""Stands in for the controller: takes ranks through prepare, promise and commit, and counts what they say."""

from __future__ import annotations

from collections import Counter
from multiprocessing.context import ForkProcess
from pathlib import Path

import anyio

from elastic_ep.wire.messages import (
    Beat,
    Commit,
    FromRank,
    Member,
    Prepare,
    Promise,
    RankReport,
    RankState,
    Seat,
    Snapshot,
    SnapshotRequest,
    View,
)
from elastic_ep.wire.sockets import ControllerWire

BEAT_S = 0.25


class Conductor:
    """Forms the group; then counts what the ranks say."""

    def __init__(self, directory: Path, ranks: int) -> None:
        self._members = tuple(Member(rank, 0) for rank in range(ranks))
        self._ready: set[int] = set()
        self._promised: set[int] = set()
        self.heard: Counter[str] = Counter()
        self.reasons: list[str] = []
        self._wire = ControllerWire(directory)
        self._wire.receive(self._hear, print)

    def _hear(self, member: Member, message: FromRank) -> None:
        self.heard[type(message).__name__] += 1
        match message:
            case SnapshotRequest():
                self._wire.send(member, Snapshot(self._wire.number, View(epoch=0, seats=()), None))
                self._wire.publish(Beat())
            case RankReport(RankState.JOINING):
                self._ready.add(member.rank)
                if len(self._ready) == len(self._members):
                    self._wire.publish(Prepare(1, self._members))
            case RankReport(RankState.FAILED, reason):
                self.reasons.append(f"rank {member.rank}: {reason}")
            case Promise():
                self._promised.add(member.rank)
                if len(self._promised) == len(self._members):
                    seats = tuple(Seat(*member, first_step=0) for member in self._members)
                    self._wire.publish(Commit(1, View(epoch=1, seats=seats)))

    async def until_ended(self, ranks: list[ForkProcess], seconds: float) -> None:
        """Raises RuntimeError if a rank fails, TimeoutError if they are not done in time."""
        try:
            with anyio.fail_after(seconds):
                while any(process.exitcode is None for process in ranks):
                    await anyio.sleep(BEAT_S)
                    self._wire.publish(Beat())
                    if self.reasons or any(process.exitcode for process in ranks):
                        raise RuntimeError("; ".join(self.reasons) or "a rank died")
        finally:
            self._wire.close()
