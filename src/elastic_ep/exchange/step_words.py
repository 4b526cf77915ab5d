"""Which step each rank of one host is in, in a file that all of them map: for exchanges whose device does not tell.

HAZARD: a rank that joins must not begin before all others have begun the same step. Mooncake's kernels clear the
half of their buffer that comes next, so what an early joiner sends into the step before would be wiped, and waited for
in vain.
"""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path

_WORD = struct.Struct("q")
_LINE = 64
_NAME = "steps"
NOT_BEGUN = -1


class StepWords:
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
