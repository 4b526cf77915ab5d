"""The files of one run's event log: for their owner alone, and together within a limit.

`events.jsonl` is written to; when it is long it becomes `events.000001.jsonl` and so on, and a new one begins.
"""

from __future__ import annotations

import os
from pathlib import Path

CURRENT = "events.jsonl"
FORMAT = 3
"""Of the lines, and of the machines' events in them."""
RANKS = "ranks"
"""The folder, beside these files, of the logs of ranks: each incarnation's in a folder of its own."""
SEGMENTS = 8
"""The limit is for about so many files; so much is deleted at once."""


def segment_name(number: int) -> str:
    """Of a file that is complete, counted from 1."""
    return f"events.{number:06}.jsonl"


def make_private(folder: Path) -> None:
    """Make `folder`, and those above it that are missing, for their owner alone. Raises OSError."""
    if not folder.parent.exists():
        make_private(folder.parent)
    folder.mkdir(0o700)
    folder.chmod(0o700)  # the umask may have taken more than others' rights


class LogFiles:
    """Raises OSError, in every method. `max_bytes` 0: without a limit."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        make_private(folder)
        self.path = folder / CURRENT
        self.number = 1
        """Of the file that is written to."""
        self.dropped = 0
        """So many of the oldest have been deleted."""
        self._max_bytes = max_bytes
        self._bytes = {1: 0}
        self._head_bytes = 0
        self._fd = self._open()

    def room(self, size: int) -> bool:
        return not self._max_bytes or sum(self._bytes.values()) + size <= self._max_bytes

    @property
    def oldest(self) -> int | None:
        """Which to delete for more room; None: none is left but the one that is written to."""
        return self.dropped + 1 if self.dropped + 1 < self.number else None

    @property
    def long(self) -> bool:
        """Time for a new file. A large head makes long files: most of what is kept are events."""
        size = self._bytes[self.number]
        return bool(self._max_bytes) and size >= max(self._max_bytes // SEGMENTS, 2 * self._head_bytes)

    @property
    def empty(self) -> bool:
        return not any(self._bytes.values())

    def write(self, data: bytes) -> None:
        left = memoryview(data)
        while left:
            written = os.write(self._fd, left)
            self._bytes[self.number] += written
            left = left[written:]

    def head_written(self) -> None:
        self._head_bytes = self._bytes[self.number]

    def drop_oldest(self) -> None:
        self.dropped += 1
        del self._bytes[self.dropped]
        (self.path.parent / segment_name(self.dropped)).unlink(missing_ok=True)

    def turn(self) -> None:
        """Begin a new file."""
        os.close(self._fd)
        self.path.rename(self.path.parent / segment_name(self.number))
        self.number += 1
        self._bytes[self.number] = self._head_bytes = 0
        self._fd = self._open()

    def close(self) -> None:
        os.close(self._fd)

    def remove(self) -> None:
        """What was made, if nothing was written."""
        self.path.unlink()
        self.path.parent.rmdir()

    def _open(self) -> int:
        fd = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        os.fchmod(fd, 0o600)
        return fd
