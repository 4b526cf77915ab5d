"""Which step each rank is in, in a file that all ranks of a host map: for exchanges whose device does not tell.

Each says too what it computes in the step, which all may read once the step has ended: words of this step and of the one
before, as a rank may begin the next while another still reads.

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

from elastic_ep.exchange.base import Work

_WORD = struct.Struct("q")
_WORK = struct.Struct("ii")
_LINE = 64
LINE_BYTES = _WORD.size + 2 * _WORK.size
_NAME = "steps"
NOT_BEGUN = -1
_SPINS = 200
"""Looks at once, then with pauses: the others are late by microseconds, or by much more."""
_PAUSE_S = 0.00002


def _mapped(directory: Path, num_ranks: int) -> mmap.mmap:
    fd = os.open(directory / _NAME, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        os.ftruncate(fd, num_ranks * _LINE)  # all ranks to the same size, so the order does not matter
        return mmap.mmap(fd, num_ranks * _LINE)
    finally:
        os.close(fd)


class StepLines:
    """The file as the carrier of a host sees it: it tells other hosts what ranks here say, and here what theirs do."""

    def __init__(self, directory: Path, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self._words = _mapped(directory, num_ranks)

    def read(self, rank: int) -> bytes:
        """`LINE_BYTES`: the step, and what is computed in it and in the one before."""
        at = rank * _LINE
        return self._words[at : at + LINE_BYTES]

    def write(self, rank: int, line: bytes) -> None:
        """The step last, so that whoever sees it sees the rest."""
        at = rank * _LINE
        self._words[at + _WORD.size : at + LINE_BYTES] = line[_WORD.size : LINE_BYTES]
        _WORD.pack_into(self._words, at, *_WORD.unpack_from(line))


class StepBarrier:
    """`rank`'s word is written by that rank alone, on other hosts by the carrier (`StepLines`); `directory` is private to
    the ranks of this host."""

    def __init__(self, directory: Path, num_ranks: int, rank: int) -> None:
        self._rank = rank
        self._words = _mapped(directory, num_ranks)
        self.say(NOT_BEGUN)  # whatever an earlier incarnation has said
        for step in range(2):
            self.say_work(step, Work(0, 0))

    def say(self, step: int) -> None:
        """This rank begins `step`, and has ended all steps before it."""
        _WORD.pack_into(self._words, self._rank * _LINE, step)

    def say_work(self, step: int, work: Work) -> None:
        """Before the first operation of `step`."""
        _WORK.pack_into(self._words, self._work_at(self._rank, step), *work)

    def work_of(self, rank: int, step: int) -> Work:
        """Of one that has taken part in `step`, until it begins the second step after it."""
        return Work(*_WORK.unpack_from(self._words, self._work_at(rank, step)))

    def _work_at(self, rank: int, step: int) -> int:
        return rank * _LINE + _WORD.size + step % 2 * _WORK.size

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
