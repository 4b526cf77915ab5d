"""When each request's tokens were handed to its client, read from a run's event log; gaps between them.

From the log, as a client does not see tokens without text (half a character, a special one).
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path


def deliveries(events: Path) -> list[list[int]]:
    """Of each request that had any, in their order: CLOCK_MONOTONIC nanoseconds."""
    stamps: defaultdict[int, list[int]] = defaultdict(list)
    with events.open() as file:
        for text in file:
            if '"Deliver"' not in text or not text.endswith("\n"):
                continue
            line = json.loads(text)
            for effect in line["effects"]:
                if effect[0] == "Deliver":
                    stamps[effect[1]].append(line["t_ns"])
    return list(stamps.values())


def gaps_ms(stamps: Sequence[int], since: float = 0, until: float = float("inf")) -> list[float]:
    """Between two tokens, those that end after `since` and begin before `until`."""
    return [(b - a) / 1e6 for a, b in pairwise(stamps) if b >= since and a < until]


def longest_gaps_ms(streams: Iterable[Sequence[int]], kill_ns: float, until_ns: float) -> list[float]:
    """Of each stream that was in mid-answer at the kill, up to the next one."""
    return [
        max(gaps_ms(stamps, kill_ns, until_ns)) for stamps in streams if stamps[0] < kill_ns <= stamps[-1]
    ]
