"""Which step each rank of one host is in, in a file that all of them map: for exchanges whose device does not tell.

HAZARD: a rank that joins must not begin before all others have begun the same step. Mooncake's kernels clear the
half of their buffer that comes next, so what an early joiner sends into the step before would be wiped, and waited for
in vain.

HAZARD: a kernel that has waited for a peer for too long masks it, and the peer is fenced. A host may be late for longer
than that, and be well: so hosts wait for each other here, and kernels for kernels alone.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from collections.abc import Callable, Collection
from pathlib import Path

_WORD = struct.Struct("q")
_LINE = 64
_NAME = "steps"
NOT_BEGUN = -1
_SPINS = 200
"""Looks at once, then with pauses: the others are late by microseconds, or by much more."""
_PAUSE_S = 0.00002


class StepBarrier:
    """`rank`'s word is written by that rank alone; `directory` is private to the group."""

    def __init__(self, directory: Path, num_ranks: int, rank: int) -> None:
        self._rank = rank
        fd = os.open(directory / _NAME, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.ftruncate(fd, num_ranks * _LINE)  # all ranks to the same size, so the order does not matter
            self._words = mmap.mmap(fd, num_ranks * _LINE)
        finally:
            os.close(fd)
        self.say(NOT_BEGUN)  # whatever an earlier incarnation has said

    def say(self, step: int) -> None:
        """This rank begins `step`, and has ended all steps before it."""
        _WORD.pack_into(self._words, self._rank * _LINE, step)

    def of(self, rank: int) -> int:
        """The step that `rank` began last. Any thread."""
        return int(_WORD.unpack_from(self._words, rank * _LINE)[0])

    def wait_for(self, step: int, ranks: Callable[[], Collection[int]]) -> None:
        """Until all of `ranks()` have begun `step`. It is asked anew at each look: who is masked is not waited for.

        The deadline is the controller's: a rank that hangs is fenced after `--hang-deadline`, and masked then.
        """
        looks = 0
        while any(self.of(rank) < step for rank in ranks()):
            looks += 1
            time.sleep(0 if looks < _SPINS else _PAUSE_S)  # either lets go of the interpreter lock
