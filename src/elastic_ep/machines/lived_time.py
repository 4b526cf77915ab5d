"""Time as the watching process has lived it: a pause of it, or of the whole machine, does not count.

All deadlines that one process sets for others go by it. After a pause of any length everybody has as much time left as
before it: whoever could not run could not answer, and the watcher cannot tell who would have.
"""

from __future__ import annotations

import math


class LivedTime:
    """A clock that stands still from when its owner was to look next until it does. Pure: readings come in.

    `rest` says when that is; whoever never calls it gets the readings as they are. All times in milliseconds.
    """

    def __init__(self) -> None:
        self.lost_ms = 0.0
        """How far it is behind the readings."""
        self._due_ms = math.inf
        self._newest_ms = -math.inf

    def rest(self, reading_ms: float, for_ms: float) -> None:
        """The owner goes to sleep at `reading_ms`, for so long."""
        self.at(reading_ms)
        self._due_ms = reading_ms + for_ms

    def at(self, reading_ms: float) -> float:
        """The time lived at a monotonic clock's reading. Never goes back, whatever the readings do."""
        if reading_ms > self._newest_ms:
            if reading_ms > self._due_ms:
                self.lost_ms += reading_ms - max(self._due_ms, self._newest_ms)
            self._newest_ms = reading_ms
        return self._newest_ms - self.lost_ms
